// Theme button and layer switches. Nothing is stored and nothing is fetched; without script all layers are shown.
"use strict";
{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
  for (const input of document.querySelectorAll("input[data-layer]")) {
    const show = () =>
      document.getElementById("frames").classList.toggle("off-" + input.dataset.layer, !input.checked);
    input.addEventListener("change", show);
    show();
  }
}
