-- What a campaign says of its list, frozen when it starts: a change of the list changes no message of a campaign under way.
-- depends: 0020_unsubscribe_copies

-- migrate: apply

alter table campaigns
    add column list_name text,                         -- all three null until it is started, and in message streams
    add column list_sender_email text,
    add column list_sender_name text;

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
