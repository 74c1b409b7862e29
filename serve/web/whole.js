// A file edited once from start to end: sent whole, edited on the server, saved from here.

import { Mp4Clock } from "./mp4.js";

// Returns the edited MP4 as a Blob; `progress(seconds)` hears how much of it is edited.
// Throws {code, message} of the server, or what fetch throws.
export async function editWhole(file, { prompt, seed, work, model, headers, signal, progress }) {
  const form = new FormData();
  form.append("prompt", prompt);
  form.append("seed", String(seed));
  if (work) form.append("work_size", work);
  if (model) form.append("model", model);
  form.append("video", file, file.name);
  const request = { method: "POST", body: form, headers, signal };
  const answer = await fetch("v1/edits", request).catch((error) => {
    throw error.name === "AbortError" ? error : { code: "unreachable" };
  });
  if (!answer.ok) {
    const refused = await answer.json().catch(() => ({ error: { code: "internal" } }));
    throw refused.error;
  }
  const clock = new Mp4Clock();
  const pieces = [];
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(pieces, { type: "video/mp4" });
    pieces.push(value);
    progress(clock.push(value));
  }
}
