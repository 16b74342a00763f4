"""The product: recipes, runs, screens. The only package here that knows files."""
