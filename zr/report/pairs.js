"use strict";

const data = JSON.parse(document.getElementById("pairs").textContent);
const part = (name) => document.getElementById(name);
const questions = data.pairs.flatMap((pair) => data.dimensions.map((dimension) => ({ pair, dimension })));
const choices = { left: part("choose-left"), same: part("choose-same"), right: part("choose-right") };
const keys = {
  1: "left", ArrowLeft: "left", 0: "same", ArrowDown: "same", 2: "right", ArrowRight: "right", ArrowUp: "back", Backspace: "back",
};
const place = `zr pairs ${data.page}`;
const kept = restore();
let at = firstOpen();

function restore() {
  const empty = { answers: {}, person: "", anonymous: crypto.getRandomValues(new Uint32Array(2)).join("-") };
  try {
    return Object.assign(empty, JSON.parse(localStorage.getItem(place)));
  } catch {
    return empty;
  }
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(kept));
  } catch {
    part("note").textContent = "This browser does not keep answers: save them before you close the page.";
  }
}

function known({ pair, dimension }) {
  return JSON.stringify([pair.id, dimension]);
}

function firstOpen() {
  const open = questions.findIndex((question) => !(known(question) in kept.answers));
  return open < 0 ? questions.length : open;
}

function show() {
  const answered = questions.filter((question) => known(question) in kept.answers).length;
  part("bar").max = questions.length;
  part("bar").value = answered;
  part("count").textContent = `${answered} of ${questions.length} answered`;
  part("back").disabled = at === 0;
  part("save").disabled = answered === 0;
  part("asking").hidden = at === questions.length;
  part("done").hidden = at < questions.length;
  if (at === questions.length) return;
  const { pair, dimension } = questions[at];
  const asked = data.asked[dimension];
  part("question").textContent = asked ? `Which picture is better in: ${asked}?` : "Which picture is better for this prompt?";
  part("prompt").textContent = pair.prompt;
  for (const side of ["left", "right"]) {
    if (part(side).src !== pair[side]) part(side).src = pair[side];
  }
  for (const [name, button] of Object.entries(choices)) {
    button.setAttribute("aria-pressed", String(kept.answers[known(questions[at])] === name));
  }
}

function choose(answer) {
  if (at === questions.length) return;
  kept.answers[known(questions[at])] = answer;
  keep();
  const open = questions.findIndex((question, i) => i > at && !(known(question) in kept.answers));
  at = open < 0 ? firstOpen() : open;
  show();
}

function back() {
  at = Math.max(0, at - 1);
  show();
}

function save() {
  const person = kept.person.trim() || kept.anonymous;
  const lines = questions.filter((question) => known(question) in kept.answers).map((question) => JSON.stringify({
    page: data.page, pair: question.pair.id, dimension: question.dimension, answer: kept.answers[known(question)], person,
  }) + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = `answers-${person.replace(/[^\p{L}\p{N}-]+/gu, "_")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  part("note").textContent = `${lines.length} answers are in the file ${link.download}, where your browser keeps downloads.`;
}

for (const [name, button] of Object.entries(choices)) button.addEventListener("click", () => choose(name));
part("back").addEventListener("click", back);
part("save").addEventListener("click", save);
part("person").value = kept.person;
part("person").addEventListener("input", () => {
  kept.person = part("person").value;
  keep();
});
for (const side of ["left", "right"]) {
  part(side).addEventListener("load", (event) => {
    const image = event.target;
    image.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) <= data.crisp);
  });
}
document.addEventListener("keydown", (event) => {
  const action = keys[event.key];
  if (!action || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target === part("person")) return;
  event.preventDefault();
  if (action === "back") back();
  else choose(action);
});
show();
