"""Alembic's environment: one linear history for all packages' tables."""

import sqlalchemy as sa
from alembic import context

from infra.db import Base


def run() -> None:
    url = context.config.attributes["database_url"]
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()


run()
