"""Text that would break a page which takes it for markup."""

from __future__ import annotations

HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1"><b>x</b>&amp;'
