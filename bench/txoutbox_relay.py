"""A process of the contender `txoutbox`: `python -P txoutbox_relay.py JSON`, in the environment that has it installed.

Imports nothing of this project. The argument is an object: `url`, `bootstrap`, `notify` (wake by LISTEN, which its
trigger then serves), and `schema_only` (print its DDL and end).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import asyncpg
from aiokafka import AIOKafkaProducer
from txoutbox import Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

CHANNEL = "txoutbox"


async def main(settings: dict[str, Any]) -> None:
    """Publish until SIGTERM."""
    pool = await asyncpg.create_pool(settings["url"], min_size=2, max_size=4)
    storage = PostgresStorage(pool, delete_on_ack=True, notify_channel=CHANNEL if settings["notify"] else None)
    if settings.get("schema_only"):
        print(storage.schema_sql())
        await pool.close()
        return
    # A wave of publications waits for its last one: lingering only makes it wait longer.
    producer = AIOKafkaProducer(
        bootstrap_servers=settings["bootstrap"],
        acks="all",
        enable_idempotence=True,
        compression_type="lz4",
        linger_ms=0,
        max_batch_size=1_000_000,
    )
    await producer.start()

    async def publish(message: Any) -> None:
        await producer.send_and_wait(message.topic, message.payload, message.key.encode())

    relay = Relay(storage, publish, config=RelayConfig(batch_size=500, concurrency=100, publish_timeout=None))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, relay.stop)
    listener = await storage.listen(relay.wake) if settings["notify"] else None
    await relay.run()
    if listener is not None:
        await listener.close()
    await producer.stop()
    await pool.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
