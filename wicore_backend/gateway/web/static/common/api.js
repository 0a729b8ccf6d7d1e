// Requests to the server that the page came from, and what can go wrong with them.

import { apiKey } from "./preferences.js";

/** The server answered with an error. */
export class ApiError extends Error {
  /** @param {number|null} retryAfter Seconds after which the server wants to be asked again, if it said so. */
  constructor(status, code, message, retryAfter = null) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, retryAfter });
  }
}

/** No answer came: no network, or no server. */
export class UnreachableError extends Error {
  name = "UnreachableError";
}

/** An answer broke off before its end. */
export class BrokenStreamError extends Error {
  name = "BrokenStreamError";
}

/**
 * Sends a request, with the person's key if there is one; the response if it is good, an ApiError or UnreachableError
 * if not.
 */
export async function request(path, { body, key = apiKey.get(), ...options } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      ...options,
      headers,
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new UnreachableError(error.message);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, or nothing: the status alone speaks.
  }
  const message = typeof error.message === "string" ? error.message : response.statusText || `HTTP ${response.status}`;
  return new ApiError(
    response.status,
    error.code ?? error.type ?? "",
    message,
    retryAfter(response.headers.get("Retry-After")),
  );
}

/** Seconds, from either form that the header has. */
export function retryAfter(value, now = Date.now()) {
  if (value === null) return null;
  const seconds = /^\d+(\.\d+)?$/.test(value) ? Number(value) : (Date.parse(value) - now) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

export async function json(path, options) {
  return (await request(path, options)).json();
}
