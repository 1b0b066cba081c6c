"""How an answer was asked for; metadata and messages of conversations; releases that differ in how they answer.

Revision ID: 0018
Revises: 0017
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


# What a release is does not change: who was served by it has met just this.
FIXED = """
CREATE FUNCTION release_is_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'what a release is does not change; make another';
END $$;
CREATE TRIGGER release_is_fixed BEFORE UPDATE OF name, adapter_digest, decoding, variant_of ON releases
FOR EACH ROW WHEN (
    (OLD.name, OLD.adapter_digest, OLD.decoding, OLD.variant_of)
    IS DISTINCT FROM (NEW.name, NEW.adapter_digest, NEW.decoding, NEW.variant_of)
) EXECUTE FUNCTION release_is_fixed();
"""


def upgrade() -> None:
    op.add_column("releases", sa.Column("decoding", postgresql.JSONB(none_as_null=True)))
    op.add_column("releases", sa.Column("variant_of", sa.String()))
    op.create_foreign_key(
        op.f("fk_releases_variant_of_releases"), "releases", "releases", ["variant_of"], ["name"]
    )
    op.execute(FIXED)
    op.add_column("episodes", sa.Column("request", postgresql.JSONB(none_as_null=True)))
    op.add_column("conversations", sa.Column("metadata", postgresql.JSONB(), server_default="{}", nullable=False))
    op.create_table(
        "conversation_items",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column(
            "conversation_id", sa.String(), sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.CheckConstraint("role IN ('system', 'user', 'assistant')", name=op.f("ck_conversation_items_role")),
    )
    op.create_index("ix_conversation_items_conversation_id_id", "conversation_items", ["conversation_id", "id"])


def downgrade() -> None:
    op.execute("DROP TRIGGER release_is_fixed ON releases")
    op.execute("DROP FUNCTION release_is_fixed")
    op.drop_column("releases", "variant_of")
    op.drop_column("releases", "decoding")
    op.drop_table("conversation_items")
    op.drop_column("conversations", "metadata")
    op.drop_column("episodes", "request")
