// The messages on the page.
//
// A message is {role, text}; the assistant's also has {model, thinking, thinkingS, reason, usage,
// timings}: what was thought and for how long, why it ended, and the API's own figures.

import { make, makeCopyButton } from "./dom.js";
import { updateMarkdown } from "./markdown.js";
import { describeEnd, describeUsage } from "./words.js";

// A message's element, and what changes it.
export class MessageView {
  #message;
  #text;
  #thinking = null;
  #waiting = make("p", { class: "waiting", hidden: true });
  #note = make("p", { class: "note" });
  #usage = make("span", { class: "usage" });
  #actions = make("div", { class: "actions" });

  constructor(message) {
    const isUser = message.role === "user";
    this.#message = message;
    this.#text = make("div", { class: isUser ? "text" : "text markdown" });
    this.element = make("article",
      { class: `message ${message.role}`, "aria-label": isUser ? "You" : message.model || "Answer" },
      this.#text, this.#note, make("div", { class: "foot" }, this.#usage, this.#actions));
    if (isUser) this.#text.textContent = message.text;
    else this.#text.before(this.#waiting);
  }

  // While the answer grows. A screen reader is told the whole when it is there.
  update() {
    this.element.setAttribute("aria-busy", "true");
    this.element.classList.add("growing");
    this.#show();
  }

  // What is being waited for while there is nothing to show; empty: nothing.
  wait(words) {
    this.#waiting.textContent = words;
    this.#waiting.hidden = words === "";
  }

  // The message is whole. `buttons` are for what can be done with it: [label, listener].
  finish(buttons) {
    this.wait("");
    if (this.#message.role === "assistant") {
      this.#show();
      this.#note.textContent = describeEnd(this.#message.reason);
      this.#usage.textContent = describeUsage(this.#message.usage, this.#message.timings);
    }
    this.offer(buttons);
    this.element.classList.remove("growing");
    this.element.removeAttribute("aria-busy");
  }

  // The actions beside Copy.
  offer(buttons) {
    const others = buttons.map(([label, onclick]) =>
      make("button", { type: "button", class: "quiet", onclick }, label));
    this.#actions.replaceChildren(
      makeCopyButton("Copy message", () => this.#message.text), ...others);
  }

  #show() {
    const { text, thinking, thinkingS } = this.#message;
    if (thinking) this.#showThinking(thinking, thinkingS, text !== "");
    updateMarkdown(this.#text, text);
  }

  #showThinking(thinking, seconds, isOver) {
    if (this.#thinking === null) {
      this.#thinking = {
        summary: make("summary"), body: make("div", { class: "thought" }),
      };
      this.#text.before(
        make("details", { class: "thinking" }, this.#thinking.summary, this.#thinking.body));
    }
    const { summary, body } = this.#thinking;
    const isRunning = !isOver && this.element.classList.contains("growing");
    const words = seconds ? `Thought for ${seconds.toFixed(1)} s` : "Thoughts";
    const title = isRunning ? "Thinking…" : words;
    if (summary.textContent !== title) summary.textContent = title;
    if (body.textContent !== thinking) body.textContent = thinking;
  }
}

// What went wrong, with a way to try again.
export function makeFailure(words, onRetry) {
  const button = make("button", { type: "button", onclick: onRetry }, "Try again");
  return make("div", { class: "failure" }, make("p", {}, words), ...(onRetry ? [button] : []));
}
