// Server-sent events out of a fetch, which, unlike EventSource, can POST and carry a key.

/** The data of each event, as it arrives. What stands after the last empty line was never finished, and is dropped. */
export async function* serverSentEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // Comments keep the line alive; other fields have no use here.
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
