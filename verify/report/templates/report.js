"use strict";
const said = document.getElementById("said");
async function copy(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}
for (const button of document.querySelectorAll(".replay button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const done = await copy(button.parentElement.querySelector("code"));
    said.textContent = done ? "Copied." : "Selected; press Ctrl-C to copy.";
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
for (const filter of document.querySelectorAll(".filter")) {
  filter.hidden = false;
  const choices = [...filter.querySelectorAll("select")];
  filter.addEventListener("change", () => {
    let shown = 0;
    for (const finding of filter.parentElement.querySelectorAll("article.finding")) {
      finding.hidden = choices.some((choice) => choice.value && finding.dataset[choice.dataset.key] !== choice.value);
      shown += !finding.hidden;
    }
    for (const more of filter.parentElement.querySelectorAll("details.more")) more.open = true;
    said.textContent = shown + " findings shown.";
  });
}
const opened = [];
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll(".part.fail details:not([open]):not(.more)")) {
    folded.open = true;
    opened.push(folded);
  }
});
addEventListener("afterprint", () => {
  for (const folded of opened.splice(0)) folded.open = false;
});
