// The description of the API, made from /openapi.json.

import { listModels } from "./api.js";
import { make, makeCopyButton } from "./dom.js";

const MAX_DEPTH = 2;
const LEVELS = ["", "inner", "deep"];

// What a request says in an example, by the field's name.
const EXAMPLES = {
  messages: [{ role: "user", content: "Hi!" }],
  prompt: "Once upon a time",
  input: "Hi!",
  content: "Hi!",
  query: "What is a panda?",
  documents: ["A bear that eats bamboo.", "A kind of bread."],
  tokens: [1, 2, 3],
  max_tokens: 200,
};

async function show() {
  const place = document.getElementById("endpoints");
  document.getElementById("origin").textContent = location.origin;
  try {
    const answer = await fetch("/openapi.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const description = await answer.json();
    const model = await firstModel();
    const sections = byTag(description).map(([tag, found]) => makeSection(tag, found, model));
    place.removeAttribute("role");
    place.replaceChildren(...sections);
  } catch (error) {
    place.textContent = `The description could not be read: ${error.message}.`;
  }
}

// A name for the examples; where the server asks for a key it is not known here.
async function firstModel() {
  try {
    return (await listModels())[0]?.id ?? "MODEL";
  } catch {
    return "MODEL";
  }
}

// [tag, [{method, path, summary, schema}]] in the description's order.
function byTag(description) {
  const tags = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "Other";
      if (!tags.has(tag)) tags.set(tag, []);
      const schema = operation.requestBody?.content?.["application/json"]?.schema;
      tags.get(tag).push({
        method: method.toUpperCase(), path, summary: operation.summary ?? "", schema,
      });
    }
  }
  return [...tags];
}

function makeSection(tag, endpoints, model) {
  const id = `tag-${tag.toLowerCase()}`;
  return make("section", { "aria-labelledby": id },
    make("h2", { id }, tag), ...endpoints.map((endpoint) => makeEndpoint(endpoint, model)));
}

function makeEndpoint(endpoint, model) {
  const { method, path, summary, schema } = endpoint;
  return make("details", { class: "endpoint" },
    make("summary", {},
      make("span", { class: "method" }, method), " ", make("span", { class: "path" }, path), " ",
      make("span", { class: "words" }, summary)),
    make("div", { class: "inside" }, makeCommand(curlLine(endpoint, model)),
      ...(schema ? [makeFields(schema)] : [])));
}

function makeCommand(text) {
  return make("div", { class: "code" },
    make("div", { class: "code-bar" },
      make("span", {}, "curl"), makeCopyButton("Copy the command", () => text)),
    make("pre", {}, make("code", {}, text)));
}

function curlLine({ method, path, schema }, model) {
  const url = `${location.origin}${path.replace(/\{[^}]*\}/g, model)}`;
  if (method === "GET") return `curl ${url}`;
  const body = JSON.stringify(exampleOf(schema ?? {}, model));
  const quoted = `'${body.replaceAll("'", "'\\''")}'`;
  return `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted}`;
}

// A body with what has to be there, and the model.
function exampleOf(schema, model) {
  const properties = schema.properties ?? {};
  const names = Object.keys(properties).filter(
    (name) => name === "model" || schema.required?.includes(name));
  const known = names.length > 1 ? names
    : [...names, ...["messages", "prompt", "input", "content", "tokens"].filter(
      (name) => name in properties).slice(0, 1)];
  return Object.fromEntries(known.map(
    (name) => [name, name === "model" ? model : EXAMPLES[name] ?? emptyOf(properties[name])]));
}

function emptyOf(schema) {
  const type = [schema?.type].flat()[0];
  return { array: [], object: {}, integer: 1, number: 1, boolean: true }[type]
    ?? schema?.enum?.[0] ?? "";
}

function makeFields(schema) {
  return make("dl", { class: "fields" }, ...rowsOf(schema, 0));
}

function rowsOf(schema, depth) {
  return Object.entries(schema.properties ?? {}).flatMap(([name, inner]) => {
    const isNeeded = schema.required?.includes(name) ?? false;
    const needed = isNeeded ? [" ", make("span", { class: "needed" }, "required")] : [];
    const words = wordsOf(inner);
    const row = make("div", { class: LEVELS[depth] },
      make("dt", {}, make("code", {}, name), ...needed),
      make("dd", {}, make("span", { class: "type" }, typeOf(inner)),
        ...(words ? [make("span", { class: "words" }, words)] : [])));
    const object = inner.type === "array" ? inner.items ?? {} : inner;
    return [row, ...(depth < MAX_DEPTH ? rowsOf(object, depth + 1) : [])];
  });
}

// In words: `list of text`, `number 0 to 2`, `"auto" or "none"`.
function typeOf(schema) {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map(typeOf))].join(" or ");
  if (Array.isArray(schema.type)) {
    return schema.type.map((type) => typeOf({ ...schema, type })).join(" or ");
  }
  if (schema.type === "array") return schema.items ? `list of ${typeOf(schema.items)}` : "list";
  const words = { string: "text", boolean: "true or false", object: "object", null: "null" };
  return (words[schema.type] ?? schema.type ?? "anything") + rangeOf(schema);
}

function rangeOf({ minimum, maximum }) {
  if (minimum !== undefined && maximum !== undefined) return ` ${minimum} to ${maximum}`;
  if (minimum !== undefined) return ` from ${minimum}`;
  return maximum === undefined ? "" : ` up to ${maximum}`;
}

function wordsOf(schema) {
  const standard = schema.default === undefined ? ""
    : ` Default: ${JSON.stringify(schema.default)}.`;
  return `${schema.description ?? ""}${standard}`.trim();
}

await show();
