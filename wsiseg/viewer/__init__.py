"""The click page: a slide in the browser, its cells outlined, and what a click does to all of them. Started by ``wsiseg view``."""
