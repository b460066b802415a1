"""The book as a website: executing its notebooks, building, the explorer, and looking at it in a browser."""
