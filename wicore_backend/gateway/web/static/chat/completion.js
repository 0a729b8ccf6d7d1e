// One chat completion, streamed.

import { ApiError, BrokenStreamError, request } from "../common/api.js";
import { serverSentEvents } from "./sse.js";

/**
 * Asks for an answer and yields its pieces: `{text}`, `{usage}` (token counts, perhaps several times, each the
 * newest) and, once, `{finish}` (the reason). Ends after the server has said that it is done.
 *
 * @throws ApiError what the server refused, or how it failed in the middle
 * @throws UnreachableError nobody answered
 * @throws BrokenStreamError the line went dead before the answer was whole
 */
export async function* complete(body, { signal }) {
  const wished = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await request("v1/chat/completions", { body: wished, signal });
  let finished = false;
  try {
    for await (const data of serverSentEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error)
        throw new ApiError(
          chunk.error.status ?? 0,
          chunk.error.code ?? chunk.error.type ?? "",
          chunk.error.message ?? "",
        );
      if (chunk.usage) yield { usage: chunk.usage };
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new BrokenStreamError(error.message);
  }
  if (!finished) throw new BrokenStreamError("the stream ended without a finish reason");
}
