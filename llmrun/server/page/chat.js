// The chat: what is said, what is asked of the server, and the page around it.

import { Failure, getHealth, listModels, streamChat } from "./api.js";
import { makeFailure, MessageView } from "./conversation.js";
import { make } from "./dom.js";
import { askForKey, Settings } from "./settings.js";
import { getKey, load, save } from "./store.js";
import { describeFailure, describeHealth } from "./words.js";

const RETRY_MS = 2000;
const HEALTH_MS = 1000;
const SAVE_MS = 1000;
const NEAR_END_PX = 60;

const byId = (id) => document.getElementById(id);
const wait = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

const page = {
  model: byId("model"), scroller: byId("scroller"), conversation: byId("conversation"),
  welcome: byId("welcome"), failure: byId("failure"), status: byId("status"),
  text: byId("text"), send: byId("send"), stop: byId("stop"),
  editing: byId("editing"), bringBack: byId("bring-back"),
};

const saved = load();
const state = {
  messages: readMessages(saved.messages),
  previous: readMessages(saved.previous),  // the conversation before this one
  model: typeof saved.model === "string" ? saved.model : "",
  models: [],
  views: [],
  running: null,  // the AbortController of the answer that is being made
  editing: null,  // {index, draft}: the message being edited, and what was typed before
};
const settings = new Settings(saved.settings, () => keep());

// ---- keeping

function readMessages(found) {
  if (!Array.isArray(found)) return [];
  return found.filter((message) => ["user", "assistant"].includes(message?.role)
    && typeof message.text === "string");
}

let savedAt = 0;

function keep() {
  savedAt = Date.now();
  const { messages, previous, model } = state;
  if (!save({ messages, previous, model, settings: settings.values })) {
    say("The browser does not keep this conversation.");
  }
}

function keepSometimes() {
  if (Date.now() - savedAt >= SAVE_MS) keep();
}

// ---- the page

function say(words) {
  if (page.status.textContent !== words) page.status.textContent = words;
}

function isAtEnd() {
  const { scrollTop, scrollHeight, clientHeight } = page.scroller;
  return scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
}

function scrollToEnd() {
  page.scroller.scrollTop = page.scroller.scrollHeight;
}

function showMessages() {
  state.views = state.messages.map((message) => new MessageView(message));
  page.conversation.replaceChildren(...state.views.map((view) => view.element));
  for (const view of state.views) view.finish([]);
  showActions();
  scrollToEnd();
}

// The last question can be edited, the last answer made again.
function showActions() {
  const isRunning = state.running !== null;
  const asked = state.messages.findLastIndex(({ role }) => role === "user");
  state.views.forEach((view, index) => {
    if (isRunning && index === state.views.length - 1) return;
    const isAsked = index === asked;
    const isAnswer = index === state.views.length - 1 && index > asked;
    const buttons = [];
    if (!isRunning && isAsked) buttons.push(["Edit", () => beginEdit(index)]);
    if (!isRunning && isAnswer) buttons.push(["Retry", retry]);
    view.offer(buttons);
  });
  // A question without an answer: the page was closed, or it was stopped at once.
  const isOpen = !isRunning && asked >= 0 && asked === state.messages.length - 1;
  if (isOpen && !page.failure.hasChildNodes()) {
    state.views[asked].offer([["Edit", () => beginEdit(asked)], ["Answer", retry]]);
  }
  page.send.hidden = isRunning;
  page.stop.hidden = !isRunning;
  page.welcome.hidden = state.messages.length > 0;
  page.bringBack.hidden = state.previous.length === 0;
  byId("new").disabled = state.messages.length === 0;
}

function addMessage(message) {
  const view = new MessageView(message);
  state.messages.push(message);
  state.views.push(view);
  page.conversation.append(view.element);
  return view;
}

function dropFrom(index) {
  state.messages.length = index;
  for (const view of state.views.splice(index)) view.element.remove();
}

function fitText() {
  page.text.style.height = "auto";
  page.text.style.height = `${page.text.scrollHeight + 2}px`;
}

function setText(text) {
  page.text.value = text;
  fitText();
}

// ---- models and health

async function loadModels() {
  let wasAsked = false;
  for (;;) {
    try {
      state.models = await listModels();
      break;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      if (error.status === 401) {
        if (!await askForKey(wasAsked || getKey() !== "")) {
          say("The server asks for an API key.");
          return false;
        }
        wasAsked = true;
      } else {
        say(describeFailure(error));
        await wait(RETRY_MS);
      }
    }
  }
  showModels(await getHealth());
  return true;
}

function showModels(health) {
  const names = state.models.map(({ id }) => id);
  const loaded = (health?.models ?? []).map(({ name }) => name).filter((n) => names.includes(n));
  if (!names.includes(state.model)) state.model = loaded[0] ?? names[0] ?? "";
  page.model.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  page.model.value = state.model;
  page.model.disabled = names.length === 0;
  say(names.length ? "" : "No model here can chat. Get one: llmrun pull smollm2-135m");
  offerThinking();
}

function offerThinking() {
  const model = state.models.find(({ id }) => id === state.model);
  settings.offerThinking(model?.meta?.capabilities?.includes("thinking") ?? false);
}

// Say what the server does until it is ready.
async function watchHealth() {
  let said = "";
  for (;;) {
    const health = await getHealth();
    const words = describeHealth(health);
    if (words || page.status.textContent === said) say(words);
    if (health?.status === "ready") return;
    said = words;
    await wait(HEALTH_MS);
  }
}

// Say what is waited for until the answer begins.
async function watchWaiting(view, hasBegun) {
  await wait(HEALTH_MS / 2);
  while (!hasBegun()) {
    const words = describeHealth(await getHealth()) || "Reading…";
    if (!hasBegun()) view.wait(words);
    await wait(HEALTH_MS);
  }
}

// ---- asking

function send() {
  const text = page.text.value.trim();
  if (!text || state.running !== null) return;
  if (state.editing !== null) {
    dropFrom(state.editing.index);
    endEdit();
  }
  addMessage({ role: "user", text }).finish([]);
  setText("");
  answer();
}

function retry() {
  if (state.running !== null) return;
  dropFrom(state.messages.findLastIndex(({ role }) => role === "user") + 1);
  answer();
}

// The messages as the API takes them. Questions that got no answer become one: many models'
// templates know no two questions in a row.
function asRequest() {
  const found = [];
  if (settings.values.system.trim()) {
    found.push({ role: "system", content: settings.values.system });
  }
  for (const { role, text, thinking } of state.messages) {
    const last = found.at(-1);
    if (role === "user" && last?.role === "user") last.content += `\n\n${text}`;
    else if (role === "user") found.push({ role, content: text });
    else found.push({ role, content: text, ...(thinking ? { reasoning_content: thinking } : {}) });
  }
  return { model: state.model, messages: found, ...settings.asRequest() };
}

async function answer() {
  const request = asRequest();
  const controller = new AbortController();
  // Until it says otherwise: so a page that is closed in the middle has kept the truth.
  const message = { role: "assistant", model: state.model, text: "", thinking: "",
    reason: "stopped" };
  state.running = controller;
  page.failure.replaceChildren();
  const view = addMessage(message);
  view.update();
  showActions();
  scrollToEnd();
  page.text.focus();
  keep();
  let failure = null;
  try {
    await receive(request, message, view, controller.signal);
  } catch (error) {
    if (!controller.signal.aborted) failure = error;
  }
  if (state.running !== controller) return;  // the conversation was left meanwhile
  state.running = null;
  finishAnswer(message, view);
  if (failure !== null) await showFailure(failure);
}

// Read the answer into `message`, and show it as often as the screen does.
async function receive(request, message, view, signal) {
  let isOver = false;
  let isDrawn = true;
  let thoughtMs = 0;
  const draw = () => {
    isDrawn = true;
    if (isOver || signal.aborted) return;
    const follows = isAtEnd();
    view.update();
    if (follows) scrollToEnd();
    keepSometimes();
  };
  const hasBegun = () => isOver || signal.aborted || message.text !== "" || message.thinking !== "";
  watchWaiting(view, hasBegun);
  try {
    for await (const piece of streamChat(request, signal)) {
      if (piece.thinking && !message.thinking) thoughtMs = performance.now();
      if (piece.text && message.thinking && message.thinkingS === undefined) {
        message.thinkingS = (performance.now() - thoughtMs) / 1000;
      }
      message.text += piece.text;
      message.thinking += piece.thinking;
      message.reason = piece.reason ?? message.reason;
      message.usage = piece.usage ?? message.usage;
      message.timings = piece.timings ?? message.timings;
      if (hasBegun()) view.wait("");
      if (isDrawn) {
        isDrawn = false;
        requestAnimationFrame(draw);
      }
    }
  } finally {
    isOver = true;
  }
}

function finishAnswer(message, view) {
  const follows = isAtEnd();
  if (message.text === "" && message.thinking === "" && message.reason === "stopped") {
    dropFrom(state.messages.length - 1);
  } else {
    view.finish([]);
  }
  keep();
  showActions();
  if (follows) scrollToEnd();
}

async function showFailure(failure) {
  if (!(failure instanceof Failure)) {
    page.failure.replaceChildren(makeFailure("Something went wrong in this page.", retry));
    scrollToEnd();
    throw failure;
  }
  if (failure.status === 401 && await askForKey(getKey() !== "")) {
    if (state.models.length === 0) await loadModels();
    answer();
    return;
  }
  page.failure.replaceChildren(makeFailure(describeFailure(failure), retry));
  showActions();
  scrollToEnd();
}

function stop() {
  state.running?.abort();
}

// ---- editing, new conversations

function beginEdit(index) {
  if (state.running !== null) return;
  state.editing = { index, draft: state.editing?.draft ?? page.text.value };
  page.editing.hidden = false;
  for (const view of state.views.slice(index)) view.element.classList.add("replaced");
  setText(state.messages[index].text);
  page.text.focus();
}

function endEdit() {
  for (const view of state.views) view.element.classList.remove("replaced");
  page.editing.hidden = true;
  state.editing = null;
}

function cancelEdit() {
  const { draft } = state.editing;
  endEdit();
  setText(draft);
  page.text.focus();
}

function newChat() {
  const running = state.running;
  state.running = null;
  running?.abort();
  if (state.editing !== null) cancelEdit();
  if (state.messages.length) state.previous = state.messages;
  showConversation([]);
}

function bringBack() {
  const messages = state.previous;
  state.previous = [];
  showConversation(messages);
}

function showConversation(messages) {
  state.messages = messages;
  page.failure.replaceChildren();
  showMessages();
  keep();
  page.text.focus();
}

// ---- what people do

function connect() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  page.text.addEventListener("keydown", (event) => {
    // While an input method composes a word, Enter takes the word.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  page.text.addEventListener("input", fitText);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) {
      return;
    }
    if (state.running !== null) stop();
    else if (state.editing !== null) cancelEdit();
  });
  page.stop.addEventListener("click", () => {
    stop();
    page.text.focus();
  });
  page.model.addEventListener("change", () => {
    state.model = page.model.value;
    offerThinking();
    keep();
  });
  byId("new").addEventListener("click", newChat);
  byId("cancel-edit").addEventListener("click", cancelEdit);
  page.bringBack.addEventListener("click", bringBack);
  window.addEventListener("pagehide", () => {
    if (state.running !== null) keep();
  });
}

connect();
showMessages();
if (await loadModels()) watchHealth();
