// This server's API, as the page uses it.

import { readEvents } from "./sse.js";
import { getKey } from "./store.js";

// What the API said instead of an answer. `status` 0: it could not be reached, or broke off.
// `error` is the API's error object, `retryAfter` seconds.
export class Failure extends Error {
  constructor(status, error, retryAfter = 0) {
    super(error.message ?? "");
    this.status = status;
    this.error = error;
    this.retryAfter = retryAfter;
  }
}

// {status, models, loading} of /health, which needs no key; null when nobody answers.
export async function getHealth() {
  try {
    const answer = await fetch("/health", { cache: "no-store" });
    return await answer.json();
  } catch {
    return null;
  }
}

// The models that can chat: {id, meta}. Throws Failure.
export async function listModels() {
  const answer = await request("/v1/models");
  const { data } = await readJson(answer);
  return data.filter((model) => model.meta?.capabilities?.includes("completion") ?? true);
}

// The pieces of a streamed answer: {thinking}, {text}, {reason}, {usage}, {timings}, each where
// there is one. Throws Failure, and the signal's reason when it is aborted.
export async function* streamChat(body, signal) {
  const answer = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isDone = false;
  try {
    for await (const data of readEvents(answer.body)) {
      if (data === "[DONE]") isDone = true;  // and on to the end: leaving now would look like a stop
      else if (!isDone) yield readChunk(data);
    }
  } catch (error) {
    if (error instanceof Failure || signal.aborted) throw error;
    if (!isDone) throw new Failure(0, { message: "the connection broke off" });
  }
  if (!isDone) throw new Failure(200, { message: "the answer broke off before its end" });
}

function readChunk(data) {
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Failure(200, chunk.error);
  const choice = chunk.choices?.[0];
  return {
    thinking: choice?.delta?.reasoning_content ?? "",
    text: choice?.delta?.content ?? "",
    reason: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
    timings: chunk.timings ?? null,
  };
}

async function request(path, options = {}) {
  const key = getKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure(0, { message: "the server cannot be reached" });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const seconds = Number(answer.headers.get("Retry-After"));
  throw new Failure(answer.status, body.error ?? {}, Number.isFinite(seconds) ? seconds : 0);
}

async function readJson(answer) {
  try {
    return await answer.json();
  } catch {
    throw new Failure(0, { message: "the answer broke off" });
  }
}
