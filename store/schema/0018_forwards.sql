-- A forward is a message in the engines' queue; what is kept here is why it was sent on
-- depends: 0017_raw_messages

-- migrate: apply

alter table forwards
    add column rule text not null default '',      -- duty, alias or notice
    add column message_id bigint,                  -- messages.id; null: it was not queued, `reply` says why
    alter column reply drop default;
delete from forwards where state = 'sent';
update forwards set reply = 'it waited when Sluice was updated; the mail is kept. ' || reply where state = 'waiting';
alter table forwards drop column state, drop column attempts, drop column due_at, drop column finished_at;
alter table forwards rename column reply to reason;
create index forwards_created on forwards (created_at);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
