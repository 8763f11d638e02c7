-- The four large tables: fifty campaigns to a partition instead of one
-- depends: 0021_list_sender

-- migrate: apply

-- With a table for each campaign, every new campaign and every statement that names none cost the more the more there had been
-- (docs/decisions/0025). The partition `…_below_150` holds the campaigns 100 to 149; `store.feed.make_room` makes the next one.

drop index accounting_number, recipients_subscriber;  -- made anew below, with the campaign in front

alter table recipients rename to old_recipients;
alter table batches rename to old_batches;
alter table retries rename to old_retries;
alter table accounting rename to old_accounting;

create table recipients (like old_recipients including defaults including constraints) partition by range (campaign_id);
create table batches (like old_batches including defaults including constraints) partition by range (campaign_id);
create table retries (like old_retries including defaults including constraints) partition by range (campaign_id);
create table accounting (like old_accounting including defaults including constraints) partition by range (campaign_id);

-- The tables that are there become ranges without a gap: the first of fifty gets the name of all fifty, each reaches to the next.
do $$
declare
    parent text;
    found record;
begin
    foreach parent in array array['recipients', 'batches', 'retries', 'accounting'] loop
        for found in
            select relation, id, lag(id) over same as before, lead(id) over same as after, (id / 50 + 1) * 50 as below
            from (
                select inhrelid::regclass as relation, substring(inhrelid::regclass::text from '_c(\d+)$')::bigint as id
                from pg_inherits where inhparent = ('old_' || parent)::regclass
            ) as old
            window same as (partition by id / 50 order by id)
        loop
            execute format('alter table old_%s detach partition %s', parent, found.relation);
            execute format(
                'alter table %s attach partition %s for values from (%s) to (%s)', parent, found.relation,
                case when found.before is null then found.below - 50 else found.id end, coalesce(found.after, found.below)
            );
            if found.before is null then
                execute format('alter table %s rename to %s_below_%s', found.relation, parent, found.below);
            end if;
        end loop;
        execute format('drop table old_%s', parent);
    end loop;
end
$$;

-- Those of the tables that were there go on as parts of these, where they are the same
alter table recipients add primary key (campaign_id, number);
alter table batches add primary key (campaign_id, batch);
alter table retries add primary key (campaign_id, number);
create index batches_open on batches (campaign_id, state, batch) where state <> 'settled';
create index retries_due on retries (campaign_id, due_at);

-- A few kilobytes per million rows. What is found by them: one recipient's records, and who a subscriber was in a campaign
create index accounting_number on accounting using brin (campaign_id, number) with (autosummarize = on);
create index recipients_subscriber on recipients using brin (campaign_id, subscriber_id);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
