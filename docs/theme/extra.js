// A table that is wider than a phone scrolls; the keyboard reaches it, too. The theme wraps tables when a page is shown.
document$.subscribe(() => setTimeout(() => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0;
}));
