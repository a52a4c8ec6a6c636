"""How the bundled "mini" cascade was trained; not needed to run Show-1."""
