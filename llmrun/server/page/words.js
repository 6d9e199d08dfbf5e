// What happened, in words for a person.

const UNITS = [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]];

export function formatCount(n) {
  return Math.round(n).toLocaleString("en");
}

// 1.1 GB
export function formatBytes(n) {
  for (const [name, size] of UNITS) {
    if (n >= size) return `${(n / size).toFixed(n >= 100 * size ? 0 : 1)} ${name}B`;
  }
  return `${n} B`;
}

// One line below an answer: "118 tokens, 42.1 tok/s, 600 of 640 prompt tokens cached". `usage` and
// `timings` are the API's; both may be missing.
export function describeUsage(usage, timings) {
  const parts = [];
  if (usage) parts.push(`${formatCount(usage.completion_tokens)} tokens`);
  if (timings?.predicted_per_second > 0) {
    parts.push(`${timings.predicted_per_second.toFixed(1)} tok/s`);
  }
  if (usage) {
    const nCached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const nPrompt = formatCount(usage.prompt_tokens);
    parts.push(nCached > 0 ? `${formatCount(nCached)} of ${nPrompt} prompt tokens cached`
      : `${nPrompt} prompt tokens`);
  }
  return parts.join(" · ");
}

// Why an answer is not whole; empty where it is.
export function describeEnd(reason) {
  if (reason === "length") return "Cut off: the limit of tokens or the end of the context.";
  if (reason === "stopped") return "Stopped.";
  if (reason === "tool_calls") return "The model called a tool; this page has none.";
  return "";
}

// What the server does before it answers, from its /health.
export function describeHealth(health) {
  if (!health) return "";
  if (health.status === "draining") return "The server is shutting down.";
  const loading = health.loading?.[0];
  if (loading) {
    const share = loading.share > 0 ? ` (${Math.round(loading.share * 100)} %)` : "";
    const doing = { downloading: "Downloading", waiting: "Making room for" }[loading.doing];
    return `${doing ?? "Loading"} ${loading.name}${share}…`;
  }
  return health.status === "loading" ? "The server is starting…" : "";
}

// What a person can do about an error of the API. `failure` is an api.js Failure.
export function describeFailure(failure) {
  const { status, error, retryAfter } = failure;
  const said = sentence(error.message || "");
  if (status === 0) {
    return "The server does not answer. Is “llmrun serve” still running?";
  }
  if (error.code === "context_length_exceeded") {
    const counts = error.n_prompt_tokens && error.n_ctx
      ? ` (${formatCount(error.n_prompt_tokens)} tokens, and there is room for `
        + `${formatCount(error.n_ctx)})` : "";
    return `The conversation is longer than the model's context${counts}. `
      + "Start a new chat, or edit the last message.";
  }
  if (status === 401) return "The server asks for an API key.";
  const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  if (error.code === "shutting_down") return `The server is shutting down.${again}`;
  if (status === 429) return `The server is busy: ${said || "its queue is full."}${again}`;
  return `${said || `The server answered with status ${status}.`}${again}`;
}

// With a capital letter and a full stop.
function sentence(text) {
  const trimmed = text.trim();
  if (!trimmed) return "";
  const whole = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?:)`]$/.test(whole) ? whole : `${whole}.`;
}
