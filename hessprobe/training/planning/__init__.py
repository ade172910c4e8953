"""What a run would take, before anything is computed: `hessprobe train --dry-run`, and the lines before a run."""
