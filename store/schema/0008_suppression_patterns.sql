-- Suppressions of domains and local parts, and a form that every engine can read
-- depends: 0007_message_streams

-- migrate: apply

-- email_key: `local@domain`, `@domain`, `@*.domain` or `local@*` (domain/suppression_key.py). Anything else would be kept and never
-- found, so it is refused whoever writes it.
alter table suppressions add constraint suppressions_email_key
    check (email_key ~ '^([^@]+@(\*|[^@*]+)|@(\*\.)?[^@*]+)$' and email_key <> '*@*');

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
