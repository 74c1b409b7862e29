// Which size frames are sent at, which the model edits them at, and what a chunk of it costs.
// A size is {width, height} in pixels; `model` is as /v1/models has it.

const TOKEN = 16; // pixels: what the model cannot cut
export const ROOM = 0.85; // of the time that a chunk lasts
const STEP = Math.SQRT2; // between a size and the next one offered
const LEAST = 64; // pixels of a side
const FAR = 2; // times as many pixels as in training, or as few, as modeling/detail/work_size.py has it

const area = ({ width, height }) => width * height;
const whole = (side) => Math.max(TOKEN, TOKEN * Math.round(side / TOKEN));
const scaled = ({ width, height }, by) => ({ width: whole(width * by), height: whole(height * by) });
export const words = ({ width, height }) => `${width}x${height}`;

export function parsed(text) {
  const [width, height] = text.split("x").map(Number);
  return { width, height };
}

// What the server makes of a `work_size`, to a token: `opened` has the last word.
export function workSize(choice, frame, model) {
  if (choice === "full") return frame;
  if (choice.includes("x")) return parsed(choice);
  const [part, of] = choice.split("/").map(Number);
  return scaled(frame, of ? part / of : Math.sqrt(area(model) / area(frame)));
}

// Seconds that a chunk takes: the networks' by what they see, the rest by the frame.
export function seconds(frame, work, model) {
  const networks = Math.max(0, model.chunk_seconds - model.frame_seconds * area(model));
  return (networks * area(work)) / area(model) + model.frame_seconds * area(frame);
}

// What is to be said against editing at `work`: the model's card knows what it was trained at.
export function unlikeTraining(work, model) {
  const card = model.card?.trained_at ?? [];
  const trained = card.length ? card : [words(model)];
  const ratios = trained.map((size) => area(work) / area(parsed(size)));
  if (ratios.some((ratio) => 1 / FAR <= ratio && ratio <= FAR)) return "";
  return `It edits at ${words(work)}, far from the ${trained.join(", ")} that this model was trained at.`;
}

// The source's own size, as far as the server takes it and is live with it at `fps`.
export function sent(source, model, fps) {
  const work = workSize(model.work_size, source, model);
  const left = (ROOM * model.chunk_frames) / fps - seconds({ width: 0, height: 0 }, work, model);
  const live = Math.max(area(model), left / model.frame_seconds);
  const fits = Math.min(live, model.max_pixels) / area(source);
  const scale = Math.min(1, Math.sqrt(fits), model.max_side / Math.max(source.width, source.height));
  const even = (side) => Math.max(TOKEN, 2 * Math.floor((side * scale) / 2 + 1e-6));
  return scale === 1 ? source : { width: even(source.width), height: even(source.height) };
}

// Working sizes that are worth a choice: a smaller one where the usual is not live, a larger one
// where it still is. The first is the server's own.
export function offers(frame, model, fps) {
  const usual = workSize(model.work_size, frame, model);
  const live = (work) => seconds(frame, work, model) <= (ROOM * model.chunk_frames) / fps;
  const found = [{ value: "", text: `${words(usual)}, the server's choice` }];
  const smaller = scaled(usual, 1 / STEP);
  if (!live(usual) && Math.min(smaller.width, smaller.height) >= LEAST) {
    found.push({ value: words(smaller), text: `${words(smaller)}, faster` });
  }
  const larger = scaled(usual, STEP);
  if (area(larger) <= Math.min(area(frame), model.max_work_pixels) && live(larger)) {
    found.push({ value: words(larger), text: `${words(larger)}, finer` });
  }
  return found;
}
