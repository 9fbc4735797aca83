"""Figures of posteriors: python benchmarks/posteriors.py posteriordb ..., or simulators ...

``posteriordb`` compares methods with reference posteriors, ``simulators`` amortised posteriors with published values. Both take
--help.
"""

import posteriordb
import simulators
import typer

app = typer.Typer(add_completion=False)
app.command("posteriordb")(posteriordb.main)
app.command("simulators")(simulators.main)

if __name__ == "__main__":
    app()
