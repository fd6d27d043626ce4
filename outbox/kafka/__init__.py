"""The Kafka edge: the only place that imports confluent_kafka (the extra `relay`)."""
