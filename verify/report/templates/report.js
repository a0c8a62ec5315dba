"use strict";
for (const button of document.querySelectorAll(".replay button")) {
  const code = button.parentElement.querySelector("code");
  const said = document.getElementById("said");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      said.textContent = "Copied.";
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch {
      getSelection().selectAllChildren(code);
      said.textContent = "Selected; press Ctrl-C to copy.";
    }
  });
}
