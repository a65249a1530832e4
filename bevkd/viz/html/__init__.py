"""One self-contained HTML page about runs: markup, charts as SVG, pictures as data, style and script in the page."""
