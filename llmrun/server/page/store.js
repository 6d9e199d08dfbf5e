// What the browser keeps: the conversation and the settings in this browser, the key in this tab.
// A browser may refuse (private windows, a full disk); then it is kept until the page is closed.

const NAME = "llmrun.chat";
const KEY_NAME = "llmrun.key";

let key = read(() => sessionStorage, KEY_NAME) ?? "";

// What was saved; an empty object where nothing (readable) was.
export function load() {
  try {
    const found = JSON.parse(read(() => localStorage, NAME) ?? "{}");
    return found !== null && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

// Whether it was saved.
export function save(state) {
  return write(() => localStorage, NAME, JSON.stringify(state));
}

export function getKey() {
  return key;
}

export function setKey(text) {
  key = text;
  write(() => sessionStorage, KEY_NAME, text);
}

// Even naming the storage may throw, so it comes as a function.
function read(storage, name) {
  try {
    return storage().getItem(name);
  } catch {
    return null;
  }
}

function write(storage, name, text) {
  try {
    storage().setItem(name, text);
    return true;
  } catch {
    return false;
  }
}
