"""The `visionhybrid` command.

Thin: each subcommand calls one function of the package and prints what it returns. app.py has the parser, the one place where
errors become one line and an exit status (1 failure, 2 wrong usage, 130 stopped), and what subcommands share; models.py, use.py,
training.py, generation.py, hosts.py, kernels.py and diagnosis.py have the subcommands; show.py prints.
"""

from visionhybrid.cli.app import app, main

# Importing a module of subcommands adds them to `app`, in this order.
from visionhybrid.cli import (
    training as training,
    use as use,
    generation as generation,
    hosts as hosts,
    models as models,
    kernels as kernels,
    diagnosis as diagnosis,
)

__all__ = ["app", "main"]
