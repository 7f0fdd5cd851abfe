"""A page that tells what runs did: self-contained HTML, and Markdown."""
