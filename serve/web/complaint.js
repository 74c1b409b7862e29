// What is wrong, under the picture, and another try: by itself where a place will come free.

import { get, show } from "./dom.js";
import { explain, worthAnotherTry } from "./errors.js";

const RETRY_S = 5;

export class Complaint {
  constructor(again) {
    this.again = again;
    get("retry").addEventListener("click", again);
  }

  // Null takes back what was said.
  say(error) {
    clearInterval(this.counting);
    show("error", !!error);
    if (!error) return;
    get("error-text").textContent = explain(error);
    show("retry", worthAnotherTry(error));
    get("retry").textContent = "Try again";
    if (error.code === "at_capacity") this.count(Math.ceil(error.retry_after_s ?? RETRY_S));
  }

  count(left) {
    const tell = () => {
      get("retry").textContent = `Try again (by itself in ${left} s)`;
      if (left-- <= 0) this.again();
    };
    tell();
    this.counting = setInterval(tell, 1000);
  }
}
