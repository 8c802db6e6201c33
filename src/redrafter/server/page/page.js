// The page: chat, speeds, tree and race over stream.js and tree.js. Everything lives in this page's memory.

const $ = (id) => document.getElementById(id);

const state = {
  model: null, // name of the server's model, once it has said it
  messages: [],
  running: null, // AbortController of what runs now; one thing at a time, so that a speed is of that thing alone
  races: 0,
};

// --- what every request shares -------------------------------------------------------------------------------------

function numberOf(id, least, whole) {
  const field = $(id);
  const value = Number(field.value.trim() || NaN);
  const good = Number.isFinite(value) && value >= least && (!whole || Number.isSafeInteger(value));
  field.setAttribute("aria-invalid", String(!good));
  if (good) return value;
  field.focus();
  const name = field.labels[0].textContent.trim();
  const kind = whole ? "a whole number" : "a number";
  throw new ServerError(`${name} is “${field.value}”: give ${kind} from ${least} up.`, 400);
}

function settings() {
  return {
    temperature: numberOf("temperature", 0, false),
    seed: numberOf("seed", 0, true),
    max_tokens: numberOf("max-tokens", 1, true),
  };
}

function withSystem(messages) {
  const system = $("system").value.trim();
  return system === "" ? messages : [{ role: "system", content: system }, ...messages];
}

async function learnModel(signal) {
  if (state.model !== null) return;
  const info = await (await ask("/v1/redrafter/info", $("key").value, { signal })).json();
  state.model = info.model;
  const drafter = info.drafter ? `drafter ${info.drafter}` : "no drafter: decoding is plain";
  $("model").textContent = `${info.model}, ${drafter}`;
  $("version").textContent = `redrafter ${info.version}`;
}

async function* stream(messages, speculation, signal) {
  const asked = settings();
  await learnModel(signal);
  yield* answer({ model: state.model, messages: withSystem(messages), speculation, ...asked }, $("key").value, signal);
}

// Run `work` as the only thing that runs; errors come out in words, Stop and Escape end it.
async function alone(work) {
  if (state.running !== null) return;
  state.running = new AbortController();
  busy(true);
  tellError(null);
  try {
    await work(state.running.signal);
  } catch (error) {
    if (error.name !== "AbortError") tellError(error);
  } finally {
    state.running = null;
    busy(false);
  }
}

function busy(yes) {
  for (const id of ["send", "race-start"]) $(id).disabled = yes;
  for (const id of ["stop", "race-stop"]) $(id).disabled = !yes;
}

function stop() {
  state.running?.abort();
}

function tellError(error) {
  const box = $("error");
  box.hidden = error === null;
  if (error === null) {
    box.textContent = "";
    return;
  }
  // What the page is for is done by the server; an error that is not its word is a bug here, and looks like one.
  box.textContent = error instanceof ServerError ? error.message : `The page failed: ${error}`;
  if (error.status === 401) $("key").focus();
  box.scrollIntoView({ block: "nearest" });
}

// --- chat ----------------------------------------------------------------------------------------------------------

function element(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function addTurn(who, text) {
  const turn = element("div", "turn");
  const body = element("span", "text", text);
  turn.append(element("span", "who", who), body);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return { turn, body };
}

function addSpans(body, spans) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  body.append(...spans.map(([text, drafted]) => element("span", drafted ? "drafted" : "own", text)));
  // Follow the answer unless its reader has scrolled back.
  if (atEnd) log.scrollTop = log.scrollHeight;
}

const shown = (number, digits, unit = "") => (number === null ? "–" : number.toFixed(digits) + unit);

function showSpeed(watch) {
  $("rate").textContent = shown(watch.rate, 1);
  $("per-step").textContent = shown(watch.perStep, 2);
  $("tokens").textContent = String(watch.tokens);
  $("first").textContent = shown(watch.wait, 2, " s");
}

async function send() {
  const text = $("prompt").value;
  if (text.trim() === "" || state.running !== null) return;
  await alone(async (signal) => {
    const asked = addTurn("you", text);
    $("prompt").value = "";
    const { turn, body } = addTurn("model");
    $("announce").textContent = "answering";
    try {
      await readAnswer([...state.messages, { role: "user", content: text }], body, turn, signal);
    } finally {
      const said = body.textContent;
      if (said === "") {
        // Nothing came: the question goes back into its field, for another try.
        asked.turn.remove();
        turn.remove();
        $("prompt").value ||= text;
        $("announce").textContent = "";
      } else {
        state.messages.push({ role: "user", content: text }, { role: "assistant", content: said });
        $("announce").textContent = said;
      }
    }
  });
}

async function readAnswer(messages, body, turn, signal) {
  const watch = new Stopwatch(performance.now());
  let finish = null;
  try {
    for await (const event of stream(messages, $("speculation").checked, signal)) {
      watch.count(event, performance.now());
      addSpans(body, event.spans);
      if (event.tree !== null) drawTree($("tree"), event.tree, (words) => ($("node").textContent = words));
      finish = event.finish ?? finish;
      showSpeed(watch);
    }
  } finally {
    if (finish === null) turn.append(element("span", "note", "not finished"));
    if (finish === "length") turn.append(element("span", "note", "ended at the most new tokens or the context's end"));
  }
}

function reset() {
  stop();
  state.messages = [];
  $("log").replaceChildren();
  tellError(null);
  $("prompt").focus();
}

// --- race ----------------------------------------------------------------------------------------------------------

async function runLane(lane, messages, most, signal) {
  const bar = $(`bar-${lane}`);
  const out = $(`lane-${lane}`);
  const watch = new Stopwatch(performance.now());
  let text = "";
  bar.max = most;
  out.textContent = "running";
  for await (const event of stream(messages, lane === "drafted", signal)) {
    watch.count(event, performance.now());
    text += event.spans.map(([piece]) => piece).join("");
    bar.value = watch.tokens;
    out.textContent = laneWords(watch);
  }
  [bar.max, bar.value] = [1, 1];
  return { watch, text };
}

function laneWords(watch) {
  const [rate, perStep] = [shown(watch.rate, 1), shown(watch.perStep, 2)];
  return `${watch.tokens} tokens, ${rate} tokens per second, ${perStep} tokens per step`;
}

function verdict(drafted, plain) {
  const same = drafted.text === plain.text;
  let at = 0;
  while (!same && drafted.text[at] === plain.text[at]) at += 1;
  const words = same
    ? "The answers are equal, character for character."
    : `The answers differ from character ${at + 1} on: in 16-bit arithmetic two nearly equal tokens can swap.`;
  const [fast, slow] = [drafted.watch.rate, plain.watch.rate];
  if (fast === null || slow === null) return `Too short to compare. ${words}`;
  for (const [lane, rate] of [["drafted", fast], ["plain", slow]]) {
    $(`bar-${lane}`).value = rate / Math.max(fast, slow);
  }
  const speeds = `${fast.toFixed(1)} against ${slow.toFixed(1)} tokens per second`;
  return `With speculation ${(fast / slow).toFixed(2)} times the speed: ${speeds}. ${words}`;
}

async function race() {
  const text = $("race-prompt").value;
  if (text.trim() === "" || state.running !== null) return;
  await alone(async (signal) => {
    const lanes = state.races++ % 2 === 0 ? ["plain", "drafted"] : ["drafted", "plain"];
    for (const lane of lanes) {
      $(`bar-${lane}`).value = 0;
      $(`lane-${lane}`).textContent = "waiting for its turn";
    }
    $("race-result").textContent = "";
    const results = {};
    let most = settings().max_tokens;
    try {
      for (const lane of lanes) {
        results[lane] = await runLane(lane, [{ role: "user", content: text }], most, signal);
        most = Math.max(1, results[lane].watch.tokens); // the other answer should be as long
      }
      $("race-result").textContent = verdict(results.drafted, results.plain);
    } catch (error) {
      $("race-result").textContent = "The race was not finished.";
      throw error;
    }
  });
}

// --- wiring --------------------------------------------------------------------------------------------------------

function enterSubmits(id, form) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $(form).requestSubmit();
  });
}

function onSubmit(form, act) {
  $(form).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

onSubmit("form", send);
onSubmit("race-form", race);
enterSubmits("prompt", "form");
enterSubmits("race-prompt", "race-form");
$("stop").addEventListener("click", stop);
$("race-stop").addEventListener("click", stop);
$("reset").addEventListener("click", reset);
$("marked").addEventListener("change", (event) => document.body.classList.toggle("marked", event.target.checked));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
learnModel().catch((error) => {
  $("model").textContent = error instanceof ServerError ? error.message : `The page failed: ${error}`;
});
