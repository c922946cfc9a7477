// The page: what is shown around the picture, and what its knobs say to the server.
const $ = (id) => document.getElementById(id);
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const wanted = new URLSearchParams(location.hash.slice(1));  // #token=…&prompt=…&seed=…&codec=jpeg
const remembered = (() => { try { return window.sessionStorage; } catch { return null; } })();
if (wanted.has("token")) {  // not left in the address bar, where it would be copied with the link
  remembered?.setItem("token", wanted.get("token"));
  const rest = new URLSearchParams([...wanted].filter(([name]) => name !== "token"));
  history.replaceState(null, "", location.pathname + (rest.size ? `#${rest}` : ""));
}

const player = new StreamDiTPlayer($("picture"), {
  url: new URL("live", location.href.replace(/[#?].*$/, "").replace(/^http/, "ws")).href,
  token: wanted.get("token") ?? remembered?.getItem("token") ?? "",
  codec: wanted.get("codec"),
});
const page = {
  prompt: wanted.get("prompt"), seed: Number(wanted.get("seed")) || 0, streaming: false, userPaused: false, hiddenPause: false,
  sent: [], intervals: [], attempts: 0, retry: 0, lastAlive: 0, feeding: 0, stopped: false,
};

// Notices

function state(name, text) { $("status").dataset.state = name; $("state").textContent = text; }
function notice(text, button, action) {
  $("notice").hidden = !text;
  $("notice-text").textContent = text ?? "";
  $("notice-button").hidden = !button;
  $("notice-button").textContent = button ?? "";
  $("notice-button").onclick = action ?? null;
  $("token-form").hidden = true;
}
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $("toast").hidden = true; }, 5000);
}
function enable(on) {
  for (const id of ["pause", "download", "snapshot"]) $(id).disabled = !on;
  $("send").disabled = !player.open;
}
function caption(text) {
  $("caption").textContent = text;
  $("caption").classList.toggle("on", Boolean(text));
}

// Connecting and starting

function connect() {
  clearTimeout(page.retry);
  page.stopped = false;
  state("wait", "connecting");
  player.connect();
}
player.addEventListener("welcome", ({ detail }) => {
  page.attempts = 0;
  $("model").textContent = `${detail.model} · ${detail.width}×${detail.height} · ${detail.scheme}`;
  if (page.guidance === undefined) $("guidance").value = detail.guidance;
  $("guidance").oninput();
  $("prompt").placeholder = detail.examples[0] ?? $("prompt").placeholder;
  if (page.prompt === null) page.prompt = detail.examples[0] ?? "";
  $("examples").replaceChildren(...detail.examples.map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text;
    chip.onclick = () => { $("prompt").value = text; steer(); };
    return chip;
  }));
  start();
});
async function start(fields = {}) {
  clearTimeout(page.retry);
  page.streaming = false;
  if (!$("notice").hidden || !player.shownAt) notice("Filling the buffer …");
  try {
    if (fields.source !== "camera") stopFeeding();
    const asked = fields.source === "snapshot" ? fields : {
      prompt: page.prompt, seed: page.seed, strength: Number($("strength").value),
      ...(page.guidance === undefined ? {} : { guidance: page.guidance }), ...fields,
    };
    const started = await player.ask("start", asked);
    page.prompt = started.prompt;
    page.streaming = true;
    page.userPaused = page.hiddenPause = false;
    showPaused();
    enable(true);
    $("seed").value = page.seed;
    for (const entry of page.sent) entry.over = true;
    remember(started.prompt, fields.source === "snapshot" ? "resumed from a snapshot" : `started with seed ${page.seed}`);
    caption(started.prompt);
    state("live", "live");
    if (document.hidden) visibility();
  } catch (mistake) {
    enable(false);
    if (mistake.code === "full") {
      state("wait", "waiting");
      notice("All places are taken. This page keeps trying until someone leaves.");
      page.retry = setTimeout(() => player.open && start(fields), 3000);
    } else if (player.open) {
      state("off", "stopped");
      notice(mistake.message, "Start again", () => start());
    }
  }
}
player.addEventListener("closed", ({ detail: { code, reason } }) => {
  page.streaming = false;
  enable(false);
  stopFeeding();
  caption("");
  state("off", "not connected");
  if (code === 4401) {
    notice("This server asks for its token.");
    $("token-form").hidden = false;
    $("token").focus();
  } else if (code === 4408) {
    page.stopped = true;
    notice("Stopped, because there was no sign of you for a while.", "Go on", connect);
  } else if (code === 4409 || code === 4400) {
    page.stopped = true;
    notice(`The server hung up: ${reason}.`, "Connect again", connect);
  } else {
    const wait = Math.min(10, 2 ** page.attempts++);
    notice("The server does not answer. Trying again …", "Try now", connect);
    page.retry = setTimeout(connect, 1000 * wait);
  }
});
player.addEventListener("ended", ({ detail }) => {
  page.streaming = false;
  enable(false);
  state("off", "stopped");
  notice(detail.reason, "Start again", () => start());
});
player.addEventListener("error", ({ detail }) => { if (detail.id === null) toast(detail.message); });
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  player.token = $("token").value;
  remembered?.setItem("token", player.token);
  notice();
  connect();
};

// Prompts, receipts and history

async function steer() {
  const prompt = $("prompt").value.trim();
  if (!prompt || !player.open) return;
  const most = player.welcome.limits.prompt_bytes;
  if (new TextEncoder().encode(prompt).length > most) return toast(`A prompt has at most ${most} bytes.`);
  if (!page.streaming) { page.prompt = prompt; return start(); }
  const entry = remember(prompt, "on its way …");
  entry.at = performance.now();
  try {
    const receipt = await player.ask("prompt", { prompt, over: Number($("over").value) });
    page.prompt = prompt;
    Object.assign(entry, { first: receipt.first_frame, complete: receipt.complete_frame, from: player.shown });
    $("prompt").select();
  } catch (mistake) {
    entry.over = true;
    entry.line.textContent = mistake.message;
    toast(mistake.message);
  }
}
function remember(prompt, text) {
  const item = document.createElement("li"), button = document.createElement("button"), said = document.createElement("span");
  const line = document.createElement("small"), track = document.createElement("span"), bar = document.createElement("i");
  button.type = "button";
  button.title = "Use this prompt again";
  said.textContent = prompt || "(no prompt)";
  line.textContent = text;
  track.className = "track";
  track.append(bar);
  button.append(said, line, track);
  button.onclick = () => { $("prompt").value = prompt; steer(); };
  item.append(button);
  item.className = "done";
  const entry = { prompt, line, bar, item, over: false };
  page.sent.unshift(entry);
  $("history").querySelector(".empty")?.remove();
  $("history").prepend(item);
  while (page.sent.length > 50) page.sent.pop().item.remove();
  return entry;
}
function receipts(frame) {
  const now = performance.now();
  for (const entry of page.sent) {
    if (entry.over || entry.first === undefined) continue;
    if (frame >= entry.first && !entry.reached) {
      entry.reached = now - entry.at;
      entry.line.textContent = `reached the picture after ${seconds(entry.reached)}`;
      caption(entry.prompt);
    }
    entry.item.className = "";
    const share = (frame - entry.from) / Math.max(1, entry.complete - entry.from);
    entry.bar.style.transform = `scaleX(${Math.max(0, Math.min(1, share))})`;
    if (frame >= entry.complete) {
      entry.line.textContent = `reached the picture after ${seconds(entry.reached)}, complete after ${seconds(now - entry.at)}`;
      entry.item.className = "done";
      entry.over = true;
    }
  }
}
$("steer").onsubmit = (event) => { event.preventDefault(); steer(); };
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); steer(); }
};
$("over").oninput = () => {
  const chunks = Number($("over").value);
  $("over-text").textContent = chunks === 0 ? "at once" : `over ${chunks} chunk${chunks > 1 ? "s" : ""}`;
};

// Seed, guidance, strength

$("restart").onsubmit = (event) => {
  event.preventDefault();
  page.seed = Math.min(4294967295, Math.max(0, Math.trunc(Number($("seed").value)) || 0));
  page.prompt = $("prompt").value.trim() || page.prompt;
  if (player.open) start();
};
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 10000); $("restart").requestSubmit(); };
function knob(id, text) {
  $(id).oninput = () => { $(`${id}-text`).textContent = text(Number($(id).value)); };
  $(id).onchange = () => {
    const value = Number($(id).value);
    if (id === "guidance") page.guidance = value;
    if (page.streaming) player.ask("set", { [id]: value }).catch((mistake) => toast(mistake.message));
  };
}
knob("guidance", (value) => (value === 1 ? "none" : value.toFixed(2)));
knob("strength", (value) => value.toFixed(2));

// The bar under the picture

function showPaused() {
  $("pause").querySelector("use").setAttribute("href", page.userPaused ? "#i-play" : "#i-pause");
  $("pause").querySelector("span").textContent = page.userPaused ? "Play" : "Pause";
  if (page.streaming) state(page.userPaused ? "wait" : "live", page.userPaused ? "paused" : "live");
}
function pause(on) {
  page.userPaused = on;
  showPaused();
  player.setPaused(on).catch((mistake) => toast(mistake.message));
}
$("pause").onclick = () => { if (page.streaming) pause(!page.userPaused); };
function visibility() {  // nobody looks: nothing is computed
  if (!page.streaming || page.userPaused || page.feeding && !$("source").hidden) return;
  if (document.hidden !== page.hiddenPause) {
    page.hiddenPause = document.hidden;
    player.setPaused(document.hidden).catch(() => {});
  }
}
document.addEventListener("visibilitychange", visibility);
$("download").onclick = () => player.tell("download");
$("snapshot").onclick = () => player.tell("snapshot");
player.addEventListener("blob", ({ detail: { kind, data } }) => {
  const mp4 = kind === KIND.MP4, link = document.createElement("a");
  const words = (page.prompt || "stream").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 48);
  link.href = URL.createObjectURL(new Blob([data], { type: mp4 ? "video/mp4" : "application/octet-stream" }));
  link.download = `${words || "stream"}.${mp4 ? "mp4" : "snap"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  toast(`${link.download}: ${(data.length / 1e6).toFixed(2)} MB`);
});
$("pixels").onclick = () => {
  const smooth = $("picture").classList.toggle("smooth");
  $("pixels").setAttribute("aria-pressed", String(!smooth));
};
$("full").onclick = () => {
  if (document.fullscreenElement) return document.exitFullscreen();
  $("frame").requestFullscreen?.().catch((mistake) => toast(mistake.message));
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("textarea, input, button, label");
  if (event.key === "/" && !typing) { event.preventDefault(); $("prompt").focus(); }
  if (event.key === " " && !typing) { event.preventDefault(); $("pause").click(); }
});
for (const kind of ["pointermove", "pointerdown", "keydown"]) {
  document.addEventListener(kind, () => {
    const now = performance.now();
    if (now - page.lastAlive > 15000) { page.lastAlive = now; player.tell("alive"); }
  }, { passive: true });
}

// Numbers

const plot = $("plot"), glow = $("glow").getContext("2d");
player.addEventListener("shown", ({ detail: { frame, interval } }) => {
  if (!$("notice").hidden) notice();
  if (interval !== null) page.intervals.push(interval);
  if (page.intervals.length > 120) page.intervals.shift();
  receipts(frame);
  if (frame % 4 === 0) { glow.drawImage($("picture"), 0, 0, 16, 16); drawPlot(); }
});
function drawPlot() {
  const scale = window.devicePixelRatio || 1, width = plot.clientWidth, height = plot.clientHeight;
  if (plot.width !== Math.round(width * scale)) { plot.width = Math.round(width * scale); plot.height = Math.round(height * scale); }
  const context = plot.getContext("2d"), style = getComputedStyle(document.documentElement);
  const due = 1000 / player.welcome.frame_rate, top = 2 * due, step = width / 120;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.globalAlpha = 0.85;
  page.intervals.forEach((interval, index) => {
    context.fillStyle = style.getPropertyValue(interval > 2 * due ? "--bad" : "--accent");
    const tall = Math.max(1, Math.min(1, interval / top) * height);
    context.fillRect((120 - page.intervals.length + index) * step, height - tall, Math.max(1, step - 1), tall);
  });
  context.globalAlpha = 1;
  context.fillStyle = style.getPropertyValue("--soft");
  context.fillRect(0, height / 2, width, 0.5);
  const recent = page.intervals.slice(-48), sum = recent.reduce((a, b) => a + b, 0);
  $("fps").textContent = sum > 0 ? (1000 * recent.length / sum).toFixed(1) : "–";
}
player.addEventListener("stats", ({ detail }) => {
  const engine = detail.engine, rows = [];
  const add = (name, value, unit, digits) => {
    if (typeof value === "number") rows.push([name, `${value.toFixed(digits)} ${unit}`.trim()]);
  };
  add("forward", engine.forward_ms_median ?? engine.forward_ms?.median, "ms", 0);
  add("decode", engine.decode_ms_median ?? engine.decode_ms?.median ?? engine.decode_ms, "ms", 0);
  rows.push(["watching", `${detail.watching} of ${detail.watching + detail.free}`]);
  $("numbers").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt"), said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    return [term, said];
  }));
});

notice("Connecting …");
connect();
