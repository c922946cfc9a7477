"""linen modules, functional: shapes and parameters only; no mesh, no data, no files."""
