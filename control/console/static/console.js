// Keeps a page fresh: asks for the same page once a second and replaces the parts that changed. Draws the chart of the overview.
"use strict";

const POINTS = 300;
const rates = [];

function draw() {
  const canvas = document.getElementById("chart");
  if (!canvas) return;
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const raw = Math.max(10, ...rates) * 1.1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const top = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const left = 52, bottom = height - 4, y = (value) => bottom - (value / top) * (height - 16);
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    pen.strokeStyle = colour("--line");
    pen.beginPath();
    pen.moveTo(left, Math.round(y(top * share)) + 0.5);
    pen.lineTo(width, Math.round(y(top * share)) + 0.5);
    pen.stroke();
    pen.fillStyle = colour("--soft");
    pen.fillText((top * share).toLocaleString("en"), left - 8, y(top * share) + (share === 0 ? -1 : 4));
  }
  if (rates.length < 2) return;
  const x = (index) => width - (rates.length - 1 - index) * ((width - left) / (POINTS - 1));
  pen.beginPath();
  rates.forEach((rate, index) => pen.lineTo(x(index), y(rate)));
  pen.strokeStyle = colour("--blue");
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.stroke();
  pen.lineTo(x(rates.length - 1), bottom);
  pen.lineTo(x(0), bottom);
  pen.globalAlpha = 0.12;
  pen.fillStyle = colour("--blue");
  pen.fill();
}

function note() {
  const rate = document.querySelector("[data-rate]");
  if (!rate) return;
  rates.push(Number(rate.dataset.rate) || 0);
  if (rates.length > POINTS) rates.shift();
  draw();
}

function replaceParts(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const wanted = new Map([...fresh.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
  for (const part of document.querySelectorAll("[data-part]")) {
    const next = wanted.get(part.dataset.part);
    // a part somebody is pressing a button in waits for the next turn
    if (next && next.outerHTML !== part.outerHTML && !part.querySelector(":active")) part.replaceWith(document.adoptNode(next));
  }
}

async function refresh() {
  const stale = document.getElementById("stale");
  try {
    const answer = await fetch(location.pathname + location.search, {
      headers: { "X-Console-Refresh": "1" }, signal: AbortSignal.timeout(8000), cache: "no-store",
    });
    if (answer.status === 401) return location.assign("/login");
    if (!answer.ok) throw new Error(String(answer.status));
    replaceParts(await answer.text());
    // the page said why it could not be shown, and now it can
    if (document.querySelector('[data-part="error"]')) return location.reload();
    stale.hidden = true;
    note();
  } catch {
    stale.hidden = false;
  }
}

async function follow() {
  for (;;) {
    await new Promise((wake) => setTimeout(wake, 1000));
    if (!document.hidden) await refresh();
  }
}

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
window.addEventListener("resize", draw);
if (document.querySelector("main[data-live]")) {
  note();
  follow();
}
