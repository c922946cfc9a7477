// The protocol's side of the browser: one WebSocket, a decoder, a jitter buffer, acknowledgements. It knows a canvas and
// nothing else of the page, so that another page can use it as it is (docs/live.md).
"use strict";

const HEADER = 8;
const KIND = { H264: 1, JPEG: 2, SNAPSHOT: 3, MP4: 4, RGB: 5 };
const KEY = 1, STILL = 2;
const ACK_MS = 60;        // acknowledgements are at least this far apart
const START_FRAMES = 2;   // pictures that lie ready before the first one is shown

class StreamDiTPlayer extends EventTarget {
  // Events (detail): welcome, started, receipt, chunk, stats, error, ended: the server's messages; shown: {video, frame,
  // interval}; blob: {kind, data}; closed: {code, reason}.
  constructor(canvas, { url, token = "", codec = null } = {}) {
    super();
    Object.assign(this, { canvas, url, token, codec });
    this.context = canvas.getContext("2d", { alpha: false });
    this.welcome = this.socket = this.decoder = null;
    this.answers = new Map();
    this.lastId = 0;
    this.paused = false;
    this.clear(0);
    this.tick = this.tick.bind(this);
    requestAnimationFrame(this.tick);
  }

  async connect() {
    const codecs = (await this.canDecode()) ? ["h264", "jpeg"] : ["jpeg"];
    const socket = this.socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify(
      { type: "hello", version: 1, codecs, token: this.token, acknowledges: true }));
    socket.onmessage = ({ data }) => typeof data === "string" ? this.onEvent(JSON.parse(data)) : this.onBinary(data);
    socket.onclose = ({ code, reason }) => {
      if (socket !== this.socket) return;
      this.socket = this.welcome = null;
      for (const { reject } of this.answers.values()) reject(new Error("the connection was lost"));
      this.answers.clear();
      this.clear(this.video);
      this.emit("closed", { code, reason });
    };
  }

  async canDecode() {  // WebCodecs exist only where the page is secure: https, or this machine
    if (this.codec === "jpeg" || !("VideoDecoder" in window)) return false;
    try {
      return (await VideoDecoder.isConfigSupported({ codec: "avc1.42c01e", optimizeForLatency: true })).supported;
    } catch { return false; }
  }

  get open() { return this.socket?.readyState === WebSocket.OPEN && this.welcome !== null; }

  tell(type, fields = {}) {
    if (this.open) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  ask(type, fields = {}) {  // a promise of the answer: receipt, started or done; rejected by an error
    return new Promise((resolve, reject) => {
      if (!this.open) return reject(new Error("not connected"));
      const id = ++this.lastId;
      this.answers.set(id, { resolve, reject });
      this.tell(type, { ...fields, id });
    });
  }

  upload(kind, bytes, flags = 0) {
    if (!this.open) return;
    const message = new Uint8Array(HEADER + bytes.byteLength);
    message[0] = kind;
    message[1] = flags;
    message.set(new Uint8Array(bytes.buffer ?? bytes, bytes.byteOffset ?? 0, bytes.byteLength), HEADER);
    this.socket.send(message);
  }

  feed(bytes, kind = KIND.RGB) {  // a camera's picture; dropped where the network lags
    if (this.socket && this.socket.bufferedAmount < 1e6) this.upload(kind, bytes);
  }

  setPaused(paused) {
    this.paused = paused;
    this.before = this.arrivalRate = this.shownAt = null;
    return this.ask(paused ? "pause" : "resume");
  }

  emit(type, detail) { this.dispatchEvent(new CustomEvent(type, { detail })); }

  onEvent(message) {
    const { type, id } = message;
    if (type === "welcome") {
      this.welcome = message;
      this.canvas.width = message.width;
      this.canvas.height = message.height;
      this.startDecoder();
    } else if (type === "started") {
      this.clear(message.video);
      this.paused = false;
    } else if (type === "chunk" && message.video === this.video) {
      // Not the first: filling the buffer came before it.
      const rate = this.chunks++ > 0 && message.seconds > 0 ? message.frames / message.seconds : null;
      if (rate) this.arrivalRate = this.arrivalRate ? 0.75 * this.arrivalRate + 0.25 * rate : rate;
    }
    const waiting = this.answers.get(id);
    if (waiting) {
      this.answers.delete(id);
      if (type === "error") return waiting.reject(Object.assign(new Error(message.message), { code: message.code }));
      waiting.resolve(message);
    }
    this.emit(type, message);
  }

  onBinary(data) {
    const view = new DataView(data);
    const kind = view.getUint8(0), flags = view.getUint8(1), video = view.getUint16(2, true), frame = view.getUint32(4, true);
    const bytes = new Uint8Array(data, HEADER);
    if (kind === KIND.SNAPSHOT || kind === KIND.MP4) return this.emit("blob", { kind, data: bytes });
    if (video !== this.video) return;
    if (kind === KIND.JPEG) this.keep(createImageBitmap(new Blob([bytes], { type: "image/jpeg" })), video, frame);
    if (kind === KIND.H264) this.decode(bytes, (flags & KEY) !== 0, frame);
  }

  // Decoding. A picture's time stamp is the order in which it came, because frame numbers start anew with each video.
  startDecoder() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.decoder = null;
    if (this.welcome.codec !== "h264") return;
    this.needKey = true;
    this.decoder = new VideoDecoder({
      output: (picture) => {
        const of = this.decoding.get(picture.timestamp);
        this.decoding.delete(picture.timestamp);
        if (of === undefined) return picture.close();
        this.keep(createImageBitmap(picture).finally(() => picture.close()), this.video, of);
      },
      error: () => { this.startDecoder(); this.tell("keyframe"); },  // damaged or reset: begin anew at a key frame
    });
    this.decoder.configure({ codec: this.welcome.codec_string, optimizeForLatency: true });
  }

  decode(bytes, key, frame) {
    if (!this.decoder || (this.needKey && !key)) return;
    this.needKey = false;
    const timestamp = this.order++;
    this.decoding.set(timestamp, frame);
    try {
      this.decoder.decode(new EncodedVideoChunk({ type: key ? "key" : "delta", timestamp, data: bytes }));
    } catch { this.startDecoder(); this.tell("keyframe"); }
  }

  keep(promise, video, frame) {
    promise.then((bitmap) => {
      if (video !== this.video || frame <= this.shown) return bitmap.close();
      this.ready.set(frame, bitmap);
    }, () => {});
  }

  // Showing. Pictures wait in `ready` and leave at the model's frame rate; where the server makes fewer, a little slower
  // rather than in fits and starts.
  clear(video) {
    for (const bitmap of this.ready?.values() ?? []) bitmap.close();
    this.ready = new Map();
    this.decoding = new Map();
    this.order ??= 0;
    this.video = video;
    this.shown = this.acknowledged = -1;
    this.position = this.before = this.shownAt = this.arrivalRate = null;
    this.ackAt = this.chunks = 0;
  }

  speed() {  // frames per second: the model's rate, or about that at which frames come, steadied by how many wait
    const rate = this.welcome.frame_rate, enough = this.ready.size > this.welcome.ahead / 4;
    if (!this.arrivalRate || this.arrivalRate > 0.97 * rate) return rate;
    return Math.min(rate, Math.max(rate / 6, this.arrivalRate * (enough ? 1.06 : 0.94)));
  }

  tick(now) {
    requestAnimationFrame(this.tick);
    if (this.open && this.shown > this.acknowledged && now - this.ackAt >= ACK_MS) {
      this.tell("shown", { video: this.video, frame: this.shown });
      this.acknowledged = this.shown;
      this.ackAt = now;
    }
    if (!this.welcome || this.paused || !this.ready.size) { this.before = now; return; }
    const numbers = [...this.ready.keys()], newest = Math.max(...numbers), oldest = Math.min(...numbers);
    if (this.position === null) {  // the first picture, or none was there in time
      if (this.ready.size < START_FRAMES) return;
      this.position = oldest;
    } else {
      this.position += Math.min(0.25, (now - (this.before ?? now)) / 1000) * this.speed();
    }
    this.before = now;
    let due = -1;
    for (const number of numbers) if (number <= this.position && number > due) due = number;
    if (due < 0) {
      if (oldest > this.position + 1) this.position = oldest;  // frames are missing: go on with those that came
      return;
    }
    this.context.drawImage(this.ready.get(due), 0, 0, this.canvas.width, this.canvas.height);
    for (const number of numbers) {
      if (number <= due) { this.ready.get(number).close(); this.ready.delete(number); }
    }
    if (this.position > newest + 1) this.position = newest + 1;  // ran dry: the clock waits for the next picture
    this.shown = due;
    this.emit("shown", { video: this.video, frame: due, interval: this.shownAt === null ? null : now - this.shownAt });
    this.shownAt = now;
  }
}
