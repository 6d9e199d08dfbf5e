// Server-sent events, read from the body of an answer.

// The data of each event as it comes, as text. Comments, and fields that nobody here sends, are
// passed over. Lines may end in LF, CR LF or CR, and be cut anywhere.
export async function* readEvents(body) {
  const parser = new EventParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.feed(value);
    }
  } finally {
    await reader.cancel().catch(() => {});  // Who stops early wants no more of it.
  }
}

export class EventParser {
  #rest = "";
  #data = [];

  // The data of the events that `text` completes.
  feed(text) {
    const events = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();  // A CR at the very end may be the first half of a line's end.
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}
