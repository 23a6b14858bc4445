"use strict";
// Every text of a sample enters the page as text (textContent), never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 25;
const filters = ["task", "model", "verdict"].map((name) => document.getElementById(name));
const search = document.getElementById("search");
const list = document.getElementById("list");
let page = 0;

function make(tag, text, kind) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function fill(select, values) {
  for (const value of values) {
    const option = make("option", value);
    option.value = value;
    select.append(option);
  }
}

function right(answer) {
  return answer.right;
}

function fits(row) {
  const [task, model, verdict] = filters.map((select) => select.value);
  const words = search.value.toLowerCase();
  const answers = row.answers.filter((answer) => !model || answer.model === model);
  if ((task && row.task !== task) || !answers.length) return false;
  if (verdict === "right" && !answers.some(right)) return false;
  if (verdict === "wrong" && answers.every(right)) return false;
  if (verdict === "disagree" && (row.answers.every(right) || !row.answers.some(right))) return false;
  const texts = () => [row.question, row.target, ...answers.map((answer) => answer.response)];
  return !words || texts().some((text) => text.toLowerCase().includes(words));
}

function details(title, text) {
  const element = document.createElement("details");
  element.append(make("summary", title), make("pre", text));
  return element;
}

function shown(row) {
  const article = document.createElement("article");
  const seed = row.seeds ? `, seed ${row.seed}` : "";
  article.append(make("h2", `${row.task}, row ${row.row}${seed}`), make("pre", row.question, "question"));
  article.append(make("p", "expected"), make("pre", row.target));
  for (const answer of row.answers) {
    if (filters[1].value && answer.model !== filters[1].value) continue;
    const repeat = row.repeats ? `, answer ${answer.repeat + 1}` : "";
    const kind = answer.right ? "right" : "wrong";
    article.append(make("p", `${answer.model}${repeat}: ${kind} by ${answer.by} (${answer.metrics})`, kind));
    article.append(make("pre", answer.response));
    if (answer.extracted) article.append(make("p", `read as: ${answer.extracted}`, "read"));
    if (answer.prompt !== null) article.append(details("prompt", answer.prompt));
  }
  if (row.prompt !== null) article.append(details("prompt", row.prompt));
  return article;
}

function show() {
  const matches = data.rows.filter(fits);
  const pages = Math.max(1, Math.ceil(matches.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  list.replaceChildren(...matches.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(shown));
  document.getElementById("count").textContent = `${matches.length} of ${data.rows.length} rows, page ${page + 1} of ${pages}`;
}

function turn(pages) {
  page += pages;
  show();
  window.scrollTo(0, 0);
}

fill(filters[0], data.tasks);
fill(filters[1], data.models);
for (const control of [...filters, search]) control.addEventListener("input", () => turn(-page));
document.getElementById("back").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
show();
