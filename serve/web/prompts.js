// The instruction: what the model's card proposes, what was asked here before, unknown words.

const KEY = "liveedit.prompts";
const KEPT = 6;

export class Prompts {
  // `chosen(prompt)` is called for a chip.
  constructor(input, chips, unknown, chosen) {
    Object.assign(this, { input, chips, unknown, chosen });
    this.card = {};
    this.touched = false; // a model's first proposal must not replace what a person wrote
    input.addEventListener("input", () => {
      this.touched = true;
      this.check();
    });
  }

  // `card.prompts` and `card.words` are what the model was made with; both may be absent.
  offer(card) {
    this.card = card;
    if (!this.touched && card.prompts?.length) this.input.value = card.prompts[0];
    this.show();
  }

  get value() {
    return this.input.value;
  }

  used() {
    const before = this.history.filter((prompt) => prompt !== this.value);
    localStorage.setItem(KEY, JSON.stringify([this.value, ...before].slice(0, KEPT)));
    this.show();
  }

  get history() {
    try {
      return JSON.parse(localStorage.getItem(KEY)) ?? [];
    } catch {
      return []; // somebody else's value
    }
  }

  show() {
    const card = this.card.prompts ?? [];
    const before = this.history.filter((prompt) => !card.includes(prompt));
    this.chips.replaceChildren(
      ...card.map((prompt) => this.chip(prompt, "")),
      ...before.map((prompt) => this.chip(prompt, "before")),
    );
    this.check();
  }

  chip(prompt, kind) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = `chip ${kind}`;
    button.textContent = prompt;
    if (kind) button.title = "You asked for this before";
    button.addEventListener("click", () => {
      this.touched = true;
      this.input.value = prompt;
      this.check();
      this.chosen(prompt);
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  check() {
    const known = new Set(this.card.words ?? []);
    const words = this.value.toLowerCase().split(/\s+/).map((word) => word.replace(/^\p{P}+|\p{P}+$/gu, ""));
    const strange = known.size ? [...new Set(words)].filter((word) => word && !known.has(word)) : [];
    this.unknown.textContent = strange.length
      ? `This model does not know: ${strange.join(", ")}. It may do nothing, or something else.`
      : "";
  }
}
