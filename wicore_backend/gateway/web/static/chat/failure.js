// What went wrong with an answer, in a form that is kept with it and shown in any language.

import { ApiError, BrokenStreamError, UnreachableError } from "../common/api.js";
import { duration, sentence, t } from "../common/i18n.js";

const KINDS = {
  401: "key",
  403: "forbidden",
  413: "too_large",
  429: "limited",
  502: "unavailable",
  503: "unavailable",
  504: "unavailable",
};

/**
 * {kind, detail, retryAt}: the kind names the text, the detail is the server's own words, retryAt a time in ms or
 * null.
 */
export function failureOf(error, now = Date.now()) {
  if (error instanceof UnreachableError) return { kind: "unreachable", detail: "", retryAt: null };
  if (error instanceof BrokenStreamError) return { kind: "broken", detail: "", retryAt: null };
  if (!(error instanceof ApiError)) return { kind: "page", detail: String(error), retryAt: null };
  const kind = KINDS[error.status] ?? (error.status >= 400 && error.status < 500 ? "refused" : "server");
  const retryAt = error.retryAfter === null ? null : now + error.retryAfter * 1000;
  return { kind, detail: error.message, retryAt };
}

/** Seconds until it makes sense to try again. */
export function secondsToWait(failure, now = Date.now()) {
  return failure.retryAt === null ? 0 : Math.max(0, Math.ceil((failure.retryAt - now) / 1000));
}

/** What to tell a person of it. */
export function wordsOf(failure, { retrying = false } = {}) {
  const words = [t(`error_${failure.kind}`)];
  if (failure.detail) words.push(sentence(failure.detail));
  const wait = secondsToWait(failure);
  if (wait > 0) words.push(t(retrying ? "retrying" : "wait", { time: duration(wait) }));
  return words.join(" ");
}
