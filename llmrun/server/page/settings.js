// The two dialogs: the settings of requests, and the API key.

import { getKey, setKey } from "./store.js";

const byId = (id) => document.getElementById(id);

// What a header can carry.
const KEY = /^[\x21-\x7e]+$/;

// The settings as {system, temperature, maxTokens, thinking}; undefined leaves it to the server.
// `onChange` is called with them after each valid change.
export class Settings {
  #values;
  #onChange;

  constructor(saved, onChange) {
    const { system, temperature, maxTokens, thinking } = saved ?? {};
    this.#values = {
      system: typeof system === "string" ? system : "",
      temperature: typeof temperature === "number" ? temperature : undefined,
      maxTokens: typeof maxTokens === "number" ? maxTokens : undefined,
      thinking: ["on", "off"].includes(thinking) ? thinking : "",
    };
    this.#onChange = onChange;
    this.#connect();
  }

  get values() {
    return this.#values;
  }

  // Whether a choice about thinking makes sense for the model.
  offerThinking(isOffered) {
    byId("thinking-row").hidden = !isOffered;
  }

  // The members of a request's body that the settings make.
  asRequest() {
    const { temperature, maxTokens, thinking } = this.#values;
    return {
      ...(temperature === undefined ? {} : { temperature }),
      ...(maxTokens === undefined ? {} : { max_tokens: maxTokens }),
      ...(thinking === "" || byId("thinking-row").hidden ? {}
        : { chat_template_kwargs: { enable_thinking: thinking === "on" } }),
    };
  }

  #connect() {
    const dialog = byId("settings");
    byId("open-settings").addEventListener("click", () => {
      byId("forget-key").hidden = !getKey();
      dialog.showModal();
    });
    byId("close-settings").addEventListener("click", () => dialog.close());
    closeOnBackdrop(dialog);
    byId("forget-key").addEventListener("click", () => {
      setKey("");
      byId("forget-key").hidden = true;
      byId("close-settings").focus();
    });
    this.#bindText("system");
    this.#bindText("thinking");
    this.#bindNumber("temperature", "temperature", "A number from 0 to 5");
    this.#bindNumber("max-tokens", "maxTokens", "A whole number from 1");
  }

  #bindText(name) {
    const input = byId(name);
    input.value = this.#values[name];
    input.addEventListener("input", () => this.#set(name, input.value));
  }

  #bindNumber(id, name, words) {
    const [input, error] = [byId(id), byId(`${id}-error`)];
    input.value = this.#values[name] ?? "";
    input.addEventListener("input", () => {
      const isValid = input.checkValidity();
      error.textContent = isValid ? "" : words;
      input.setAttribute("aria-invalid", String(!isValid));
      if (isValid) this.#set(name, input.value === "" ? undefined : input.valueAsNumber);
    });
  }

  #set(name, value) {
    this.#values = { ...this.#values, [name]: value };
    this.#onChange(this.#values);
  }
}

// Ask for the key; whether one was given. `wasWrong`: the server did not take the last one.
export function askForKey(wasWrong) {
  const [dialog, input, error] = [byId("key-dialog"), byId("key"), byId("key-error")];
  input.value = "";
  error.textContent = wasWrong ? "The server did not take that key." : "";
  return new Promise((resolve) => {
    const take = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!KEY.test(key)) {
        error.textContent = key ? "A key has no spaces, and letters without accents."
          : "Type the key.";
        input.focus();
        return;
      }
      setKey(key);
      dialog.close("given");
    };
    const cancel = () => dialog.close("");
    const form = byId("key-form");
    form.addEventListener("submit", take);
    byId("cancel-key").addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", take);
      byId("cancel-key").removeEventListener("click", cancel);
      input.value = "";
      resolve(dialog.returnValue === "given");
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
    input.focus();
  });
}

function closeOnBackdrop(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
