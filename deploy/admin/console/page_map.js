// The map of a replica's pages: a canvas with one square for each cell, in page order.

import { make } from "./dom.js";

export const STATES = { f: "free", a: "active", s: "shared", c: "cached", m: "in flight" };
const COLOURS = { f: "--free", a: "--active", s: "--shared", c: "--cached", m: "--moving", r: "--moving" };
const LEAST = 5, MOST = 14, GAP = 1; // of a square, in CSS pixels

/** What the colours mean, as items of a list. */
export function legend() {
  return Object.entries(STATES).map(([state, name]) => make("li", {}, make("span", { class: "swatch", "data-state": state }), name));
}

/** So many cells of each state, as words. */
export function counts(cells) {
  const found = { f: 0, a: 0, s: 0, c: 0, m: 0 };
  for (const state of cells) found[state === "r" ? "m" : state]++;
  return found;
}

/** Draws `cells` (a letter each): about as high for few cells as for many, and redrawn only where something differs. */
export function draw(canvas, cells) {
  const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  if (!width) return;
  const style = getComputedStyle(document.documentElement);
  const seen = [cells, width, scale, style.getPropertyValue("--free")].join();
  if (canvas.seen === seen) return;
  canvas.seen = seen;
  const step = Math.max(LEAST, Math.min(MOST, Math.floor(Math.sqrt((width * 112) / Math.max(cells.length, 1)))));
  const columns = Math.max(1, Math.floor((width + GAP) / step)), rows = Math.max(1, Math.ceil(cells.length / columns));
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(rows * step * scale);
  canvas.style.height = `${rows * step}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const colours = Object.fromEntries(Object.entries(COLOURS).map(([state, name]) => [state, style.getPropertyValue(name).trim()]));
  for (let i = 0; i < cells.length; i++) {
    context.fillStyle = colours[cells[i]] ?? colours.f;
    context.fillRect((i % columns) * step, Math.floor(i / columns) * step, step - GAP, step - GAP);
  }
}
