"""How the weights in the package were trained: the recipe, its data and what it leaves behind."""
