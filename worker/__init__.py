"""One replica: step scheduler, page pool, model runner, sampler, and the actor around them."""
