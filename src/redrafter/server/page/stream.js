// One streamed answer: request, server-sent events, errors in words, and a stopwatch. Nothing here touches the page.

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// "in 3 s" from a Retry-After header of seconds; a date or nothing says "soon".
function whenToRetry(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return Number.isFinite(seconds) ? `in ${seconds} s` : "soon";
}

async function errorOf(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    said = response.statusText || "no explanation";
  }
  switch (response.status) {
    case 401:
      return new ServerError("This server wants an API key: fill in the field “API key” and try again.", 401);
    case 403:
      return new ServerError(`The server refuses this request: ${said}`, 403);
    case 429:
      return new ServerError(`Too many requests with this key: try again ${whenToRetry(response)}.`, 429);
    case 503:
      return new ServerError(`The server is busy: try again ${whenToRetry(response)}.`, 503);
    default:
      return new ServerError(`The server answered ${response.status}: ${said}`, response.status);
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key !== "") headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is it still running?", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

// The data of each server-sent event; lines that start with ":" keep the connection alive and say nothing.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke in the middle of the answer.", 0);
    }
    if (part.done) return;
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

// Yields {spans: [[text, drafted]], step, tree, finish, usage}; without details, all text counts as the model's own.
async function* answer(body, key, signal) {
  const response = await ask("/v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Redrafter-Details": "1" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(`The server broke the answer off: ${event.error.message}`, 500);
    const choice = event.choices?.[0];
    const text = choice?.delta?.content;
    yield {
      spans: event.redrafter?.spans ?? (text ? [[text, false]] : []),
      step: event.redrafter?.step ?? null,
      tree: event.redrafter?.tree ?? null,
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
    if (choice?.finish_reason === "error") throw new ServerError("The model failed in the middle of the answer.", 500);
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

// Counts tokens and steps. The rate leaves out what the first event brought, since nobody saw how long that took.
class Stopwatch {
  constructor(now) {
    this.start = now;
    this.first = null;
    this.last = null;
    this.firstTokens = 0;
    this.tokens = 0;
    this.steps = 0;
  }

  count(event, now) {
    if (event.step !== null) {
      this.steps += 1;
      this.tokens += event.step.accepted + 1;
      this.last = now;
      if (this.first === null) {
        this.first = now;
        this.firstTokens = this.tokens;
      }
    }
    // An answer may end inside what a step accepted: the server's count is the true one.
    if (event.usage?.completion_tokens) this.tokens = event.usage.completion_tokens;
  }

  get rate() {
    const seconds = (this.last - this.first) / 1000;
    return this.first === null || seconds <= 0 ? null : (this.tokens - this.firstTokens) / seconds;
  }

  get perStep() {
    return this.steps === 0 ? null : this.tokens / this.steps;
  }

  get wait() {
    return this.first === null ? null : (this.first - this.start) / 1000;
  }
}
