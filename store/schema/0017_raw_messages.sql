-- Raw messages: parts of a message stream that go out as they were handed in
-- depends: 0016_amp

-- migrate: apply

alter table message_parts add column raw bytea;   -- header and body in CRLF lines; null: the content says what is composed

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
