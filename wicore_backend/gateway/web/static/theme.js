// A classic script in the head, so that a page is never first painted in the other theme.
{
  let theme = null;
  try {
    theme = JSON.parse(localStorage.getItem("wicore.preferences") ?? "{}").theme;
  } catch {
    // No storage, or not ours: as the system has it.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
