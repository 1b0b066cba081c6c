"""``everloop reward``: what the reward model believes, and what operators decide about those it believes."""

from deploy.decisions_cli import COMMANDS
from reward.cli import app

for command in COMMANDS:
    app.command()(command)
