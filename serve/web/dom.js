// Elements by their ids.

export const get = (id) => document.getElementById(id);
export const show = (id, shown) => get(id).classList.toggle("hidden", !shown);
