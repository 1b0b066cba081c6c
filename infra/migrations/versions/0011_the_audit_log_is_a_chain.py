"""The audit log is a chain: each row bears a hash over itself and the row before, made by the database.

Revision ID: 0011
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# deploy/audit.py computes the same, from what it reads: each field as its length in bytes, a colon and its text.
SEAL = """
    CREATE FUNCTION audit_field(field text) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT coalesce(octet_length(field) || ':' || field, '-') $$;

    CREATE FUNCTION audit_hash(entry audit_log) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT encode(sha256(convert_to(
        audit_field(entry.id::text) || audit_field(entry.actor) || audit_field(entry.action)
        || audit_field(entry.subject) || audit_field(entry.reason) || audit_field(entry.address)
        || audit_field(entry.details::text)
        || audit_field((extract(epoch FROM entry.created_at) * 1000000)::bigint::text)
        || audit_field(entry.previous_hash), 'UTF8')), 'hex') $$;

    CREATE FUNCTION audit_log_seal() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE last audit_log;
    BEGIN
        -- One at a time, until its transaction ends: a chain has one end.
        PERFORM pg_advisory_xact_lock(hashtextextended('everloop audit_log', 0));
        SELECT * INTO last FROM audit_log ORDER BY id DESC LIMIT 1;
        NEW.id := coalesce(last.id, 0) + 1;
        NEW.created_at := clock_timestamp();
        NEW.previous_hash := coalesce(last.hash, '');
        NEW.hash := audit_hash(NEW);
        RETURN NEW;
    END $$;
"""


def upgrade() -> None:
    for column in ("address", "previous_hash", "hash"):
        op.add_column("audit_log", sa.Column(column, sa.String()))
    op.execute(SEAL)
    op.execute("DROP TRIGGER audit_log_append_only ON audit_log")
    op.execute("DROP FUNCTION audit_log_is_append_only")
    op.execute("""
        DO $$
        DECLARE entry audit_log; before text := '';
        BEGIN
            FOR entry IN SELECT * FROM audit_log ORDER BY id LOOP
                entry.previous_hash := before;
                before := audit_hash(entry);
                UPDATE audit_log SET previous_hash = entry.previous_hash, hash = before WHERE id = entry.id;
            END LOOP;
        END $$
    """)
    for column in ("previous_hash", "hash"):
        op.alter_column("audit_log", column, nullable=False)
    op.create_unique_constraint("uq_audit_log_previous_hash", "audit_log", ["previous_hash"])
    op.execute("""
        CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
        FOR EACH STATEMENT EXECUTE FUNCTION is_append_only()
    """)
    op.execute("""
        CREATE TRIGGER audit_log_sealed BEFORE INSERT ON audit_log
        FOR EACH ROW EXECUTE FUNCTION audit_log_seal()
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER audit_log_sealed ON audit_log")
    op.execute("DROP TRIGGER audit_log_append_only ON audit_log")
    op.execute("""
        CREATE FUNCTION audit_log_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'audit_log is append-only'; END $$
    """)
    op.execute("""
        CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
        FOR EACH STATEMENT EXECUTE FUNCTION audit_log_is_append_only()
    """)
    op.execute("DROP FUNCTION audit_log_seal")
    op.execute("DROP FUNCTION audit_hash")
    op.execute("DROP FUNCTION audit_field")
    for column in ("hash", "previous_hash", "address"):
        op.drop_column("audit_log", column)
