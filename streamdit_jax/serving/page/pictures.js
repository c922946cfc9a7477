// Pictures of the viewer's own (a camera, a video, an image) and snapshots: what goes from here to the server.
// Pictures are resized here to the model's size.
const scratch = document.createElement("canvas");
function fitted(source, width, height) {  // covers the model's size, cut at the centre
  Object.assign(scratch, { width: player.welcome.width, height: player.welcome.height });
  const scale = Math.max(scratch.width / width, scratch.height / height);
  const context = scratch.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, (scratch.width - width * scale) / 2, (scratch.height - height * scale) / 2, width * scale, height * scale);
  const rgba = context.getImageData(0, 0, scratch.width, scratch.height).data, rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from];
    rgb[to++] = rgba[from + 1];
    rgb[to++] = rgba[from + 2];
  }
  return rgb;
}
function feedPicture() {
  const source = $("source");
  if (!page.streaming || page.userPaused || source.readyState < 2 || !player.open) return;
  const rgb = fitted(source, source.videoWidth, source.videoHeight);
  if (rgb.length <= 128 * 128 * 3) return player.feed(rgb);
  scratch.toBlob(async (blob) => player.feed(new Uint8Array(await blob.arrayBuffer()), KIND.JPEG), "image/jpeg", 0.92);
}
async function beginFeeding() {
  const source = $("source");
  source.hidden = false;
  await source.play();
  await start({ source: "camera" });
  clearInterval(page.feeding);
  page.feeding = setInterval(feedPicture, 1000 / player.welcome.frame_rate);
}
function stopFeeding() {
  const source = $("source");
  clearInterval(page.feeding);
  source.srcObject?.getTracks().forEach((track) => track.stop());
  source.srcObject = null;
  if (source.src) { URL.revokeObjectURL(source.src); source.removeAttribute("src"); source.load(); }
  source.hidden = true;
  $("camera").setAttribute("aria-pressed", "false");
}
$("camera").onclick = async () => {
  if ($("camera").getAttribute("aria-pressed") === "true") return start();
  if (!navigator.mediaDevices) return toast("A browser lends its camera to pages from this machine or over https only.");
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 } });
    stopFeeding();
    $("source").srcObject = stream;
    $("camera").setAttribute("aria-pressed", "true");
    await beginFeeding();
  } catch (mistake) { stopFeeding(); toast(`The camera could not be used: ${mistake.message}`); }
};
function chosen(id, action) {
  $(id).onchange = async () => {
    const file = $(id).files[0];
    $(id).value = "";
    if (!file || !player.open) return;
    try { await action(file); } catch (mistake) { toast(`${file.name}: ${mistake.message}`); }
  };
}
chosen("video", async (file) => {
  stopFeeding();
  $("source").src = URL.createObjectURL(file);
  await beginFeeding();
});
chosen("image", async (file) => {
  const bitmap = await createImageBitmap(file);
  player.upload(KIND.RGB, fitted(bitmap, bitmap.width, bitmap.height), STILL);
  bitmap.close();
  await start({ source: "image" });
});
chosen("resume", async (file) => {
  const most = player.welcome.limits.snapshot_bytes;
  if (file.size > most) throw new Error(`has ${file.size} bytes; a snapshot here has at most ${most}`);
  player.upload(KIND.SNAPSHOT, new Uint8Array(await file.arrayBuffer()));
  await start({ source: "snapshot" });
});

